"""Options that may stand alone, and what they then mean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

_ALONE = {"--cache": ("dynamic", "static")}


def with_values(tokens: Sequence[str]) -> list[str]:
    """The arguments with the first of its values behind each option of `export` that has none: `--cache dynamic`."""
    if next((token for token in tokens if not token.startswith("-")), None) != "export":
        return list(tokens)
    found: list[str] = []
    for token, behind in zip_longest(tokens, tokens[1:]):
        found.append(token)
        if token in _ALONE and (behind is None or behind.startswith("-")):
            found.append(_ALONE[token][0])
    return found
