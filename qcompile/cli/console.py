"""Where the command line writes: results to stdout, what goes on to stderr; plain and wide when not on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qcompile.cli.process import Quiet
from qcompile.cli.started import is_first
from qcompile.files import replaced
from qcompile.messages import visible

if TYPE_CHECKING:
    from qcompile.report.base import ReportBase

_PLAIN_WIDTH = 160


class _PlainConsole(Console):
    """Shows what files and names hold, and obeys none of it: whatever is printed, control characters are escaped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def out() -> Console:
    return _console(sys.stdout)


def err(*, of_all: bool = False) -> Console:
    """`of_all`: also where another process prints what this one would."""
    return _console(sys.stderr, of_all)


def interactive() -> bool:
    """Whether somebody watches: progress bars are for them alone."""
    return sys.stderr.isatty() and sys.stdout.isatty()


def _console(stream: TextIO, of_all: bool = False) -> Console:
    # Read when asked for, as a caller may have redirected the stream; a file has no width of its own.
    wide = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return _PlainConsole(
        file=cast(TextIO, Quiet(stream)), width=wide, highlight=False, quiet=not (of_all or is_first())
    )


def step(message: str) -> None:
    """Tell what is done next."""
    err().print(message, style="dim", markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Tell what makes the result doubtful."""
    err().print(f"WARNING: {message}", style="bold yellow", markup=False, soft_wrap=True)


def write_report(path: Path, report: ReportBase) -> None:
    """Write it whole or not at all."""
    with replaced(path) as new:
        new.write_text(report.to_json() + "\n", encoding="utf-8")
