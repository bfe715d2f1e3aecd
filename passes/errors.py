"""The root of qcompile's exception tree; `qcompile.errors` adds the ones of the front and back ends."""

from __future__ import annotations


class QCompileError(Exception):
    """Every error that qcompile raises on purpose. The message names the module, what was found and what to do."""


class PassError(QCompileError):
    """A pass met a graph that it must not rewrite and cannot leave as it is."""
