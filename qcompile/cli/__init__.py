"""The `qcompile` command: one file for each subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qcompile.cli.process import as_process

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's own arguments); returns the exit code."""
    with as_process() as process:
        from qcompile.cli.app import run

        process.starting = False
        try:
            return run(sys.argv[1:] if argv is None else list(argv), process)
        except KeyboardInterrupt:
            return process.interrupted()
