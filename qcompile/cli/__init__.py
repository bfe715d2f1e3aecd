"""The `qcompile` command: one file for each subcommand."""

from __future__ import annotations

from qcompile.cli.app import main

__all__ = ["main"]
