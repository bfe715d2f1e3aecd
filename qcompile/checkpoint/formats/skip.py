"""Skip lists: the layers that a checkpoint leaves in floating point, as the tools spell them and as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from functools import lru_cache

from qcompile.checkpoint.formats.base import Contents


def skipped_names(contents: Contents) -> list[str]:
    """The full name of each layer that stays in floating point, a tied one too: servers make a module for both."""
    tied = [name for pair in contents.tied.items() for name in pair if name not in contents.schemes]
    return sorted({*contents.unquantized, *tied})


def is_skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether a skip list with whole names, parents, last parts (`mlp.gate`) or globs has the layer called `name`.

    Whole parts of names only: servers that look for substrings would find `mlp.gate` in `mlp.gate_proj`.
    """
    return any(
        _glob(pattern).match(name) is not None if any(c in pattern for c in "*?[") else f".{pattern}." in f".{name}."
        for pattern in patterns
    )


@lru_cache(maxsize=16_384)
def _glob(pattern: str) -> re.Pattern[str]:
    """`fnmatch` keeps 256 patterns, and compiles those of a longer list again for each name."""
    return re.compile(translate(pattern))


def summarize(skipped: Sequence[str], quantized: Iterable[str]) -> list[str]:
    """The skip list as Model Optimizer writes it: `a.b*` or `a.b.*` for a module that has no quantized layer.

    `a.b*` is the first choice; with a quantized `a.b2` it would be wrong, and then it is `a.b.*`.
    """
    prefixes = {name[:end] for name in quantized for end in range(len(name) + 1)}
    result: set[str] = set()
    for name in skipped:
        ends = [end for end, char in enumerate(name) if char == "."]
        choices = [choice for end in ends for choice in (f"{name[:end]}*", f"{name[:end]}.*")]
        result.add(next((choice for choice in choices if choice[:-1] not in prefixes), name))
    return sorted(result)
