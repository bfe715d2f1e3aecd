"""Wording that errors and notices share."""

from __future__ import annotations

from passes.messages import some

__all__ = ["first_line", "some"]


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
