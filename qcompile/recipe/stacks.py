"""Blocks counted from the end: `layers.-1` is the last of `layers`, whatever its number is in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import product

from qcompile.recipe.globs import alternatives, glob_matches

_FROM_END = re.compile(r"(^|\.)-")


@lru_cache(maxsize=4096)
def counts_from_end(pattern: str) -> bool:
    """Whether a component of the glob begins with a minus: `*layers.-1.*`, `*layers.-[1-4].*`, `*h.{-1,-2}.*`."""
    return any(_FROM_END.search(glob) for glob in alternatives(pattern))


class Stacks:
    """The numbered modules of one model.

    Attributes:
        lengths: path of what holds them -> one more than the largest number: {"encoder.layers": 12}.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        """`names` are those of all quantizers of the model."""
        self.lengths: dict[str, int] = {}
        for name in names:
            parts = name.split(".")
            for index, part in enumerate(parts):
                if part.isdecimal():
                    path = ".".join(parts[:index])
                    self.lengths[path] = max(self.lengths.get(path, 0), int(part) + 1)

    def matches(self, name: str, pattern: str) -> bool:
        """`glob_matches`, where the glob may give numbers from the end."""
        if not counts_from_end(pattern):
            return glob_matches(name, pattern)
        return any(glob_matches(spelled, pattern) for spelled in self._spellings(name))

    def _spellings(self, name: str) -> Iterable[str]:
        """`name`, and the same with some or all of its numbers counted from the end."""
        parts = name.split(".")
        options = [[part] for part in parts]
        for index, part in enumerate(parts):
            if part.isdecimal():
                options[index].append(str(int(part) - self.lengths[".".join(parts[:index])]))
        return map(".".join, product(*options))

    def __str__(self) -> str:
        shown = [f"{path or 'the root'} (0 to {length - 1})" for path, length in self.lengths.items()]
        return ", ".join(shown[:6]) + (", ..." if shown[6:] else "") or "no numbered modules"
