"""The `qcompile` command. One file for each subcommand; torch is imported only by those that need it."""

from __future__ import annotations

from qcompile.cli.app import main

__all__ = ["main"]
