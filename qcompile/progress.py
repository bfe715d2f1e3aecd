"""The one progress bar: on stderr, gone when the work is done, and only where somebody can watch it move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar", "progress_bar"]


class Bar:
    """A bar that is shown, or not: who works need not know."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def advance(self, count: int = 1, told: str = "") -> None:
        """`told`: what has been done by now, in other units."""
        self._bar.update(self._task, advance=count, told=told)

    def phase(self, what: str, done: int, total: int) -> None:
        """Another part of the work has begun, or come to `done` of `total`."""
        self._bar.update(self._task, description=what, completed=done, total=total)


@contextmanager
def progress_bar(what: str, total: int | None, show: bool, *, of_bytes: bool = False) -> Iterator[Bar]:
    """A bar for as long as the body runs.

    Args:
        what: is being done.
        total: how many steps or bytes; None where nobody knows.
        show: the caller's wish; on a stream that is no terminal, and no notebook, there is none in any case.
        of_bytes: counts bytes and not steps.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),  # names of others' files and layers may look like markup
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    shown = show and (console.is_terminal or console.is_jupyter)
    with bar if shown else nullcontext():  # `disable=True` of older releases of rich ends with an empty line
        yield Bar(bar, bar.add_task(what, total=total, told=""))
