"""The root of qcompile's exception tree; `qcompile.errors` adds the ones of the front and back ends."""

from __future__ import annotations

from passes.messages import LONGEST_MESSAGE, cut, visible


class QCompileError(Exception):
    """Every error that qcompile raises on purpose. The message names the module, what was found and what to do.

    It holds names and values of files that somebody else made, so it is shown without control characters, and never
    longer than a screen or two.
    """

    def __str__(self) -> str:
        return cut(visible(cut(super().__str__(), LONGEST_MESSAGE)), LONGEST_MESSAGE)


class PassError(QCompileError):
    """A pass met a graph that it must not rewrite and cannot leave as it is."""


class CompatError(QCompileError):
    """Another library is not as it was when it was tested: a name of its insides is gone, or does another thing."""
