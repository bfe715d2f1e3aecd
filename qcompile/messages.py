"""Wording that errors and notices share."""

from __future__ import annotations

from passes.messages import cut, some, value, visible

__all__ = ["cut", "first_line", "some", "value", "visible"]

_LONGEST_LINE = 500


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line."""
    text = str(error).strip()
    return cut(f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__, _LONGEST_LINE)
