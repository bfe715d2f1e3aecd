"""The parts of a regular expression, each with the places at which it can end; `regexes.py` says what for."""

from __future__ import annotations

import re
from typing import Any

MOST_STEPS = 300_000  # of one match, about a third of a second


class TooLong(Exception):
    """A match takes more than `MOST_STEPS`, or has a part that is matched by Python alone."""


class Match:
    """The places, as bits, where parts can end in one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._found: dict[tuple[int, int], int] = {}
        self._steps = 0

    def ends(self, part: Part, start: int) -> int:
        key = (id(part), start)
        if key not in self._found:
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise TooLong
            self._found[key] = part.ends(self, start)
        return self._found[key]

    def all_ends(self, part: Part, starts: int) -> int:
        result = 0
        while starts:
            lowest = starts & -starts
            result |= self.ends(part, lowest.bit_length() - 1)
            starts ^= lowest
            self._steps += 1
        return result


class Part:
    """Matches from one place in a text."""

    def ways(self, length: int) -> float:
        """At most so many ways to match a text of that length from one place."""
        raise NotImplementedError

    def ends(self, match: Match, start: int) -> int:
        """The places where it can end, as bits."""
        raise NotImplementedError


class Leaf(Part):
    """What takes so many characters, or looks at a boundary and takes none."""

    def __init__(self, compiled: re.Pattern[str], characters: int) -> None:
        self._compiled, self._characters = compiled, characters

    def takes(self, character: str) -> bool:
        """Whether it can begin with that character, as far as one character tells."""
        return self._characters != 1 or self._compiled.match(character) is not None

    def ways(self, length: int) -> float:
        return 1

    def ends(self, match: Match, start: int) -> int:
        return 1 << start + self._characters if self._compiled.match(match.text, start) else 0


class Sequence(Part):
    """One part after the other."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def ways(self, length: int) -> float:
        result = 1.0
        for part in self.parts:
            result *= part.ways(length)
        return result

    def ends(self, match: Match, start: int) -> int:
        places = 1 << start
        for part in self.parts:
            places = match.all_ends(part, places)
        return places


class Branch(Part):
    """`a|b`."""

    def __init__(self, options: list[Part]) -> None:
        self._options = options

    def ways(self, length: int) -> float:
        return sum(option.ways(length) for option in self._options)

    def ends(self, match: Match, start: int) -> int:
        result = 0
        for option in self._options:
            result |= match.ends(option, start)
        return result


class Repeat(Part):
    """`a{low,high}`.

    Attributes:
        single: what follows takes nothing that it takes, so that it can end in one place only.
    """

    def __init__(self, part: Part, low: Any, high: Any) -> None:
        self.part, self._low, self._high, self.single = part, int(low), int(high), False

    def ways(self, length: int) -> float:
        inner, counts = self.part.ways(length), max(min(self._high, length + 1) - min(self._low, length + 1) + 1, 1)
        if self.single:
            return 1
        if isinstance(self.part, Leaf):  # at most one way each time
            return counts
        if self._high > 8:
            return float("inf")
        return sum(inner**count for count in range(self._low, self._high + 1))

    def ends(self, match: Match, start: int) -> int:
        places = 1 << start
        for _ in range(self._low):
            before, places = places, match.all_ends(self.part, places)
            if places in (before, 0):  # and so after each further round
                break
        result = new = places
        for _ in range(self._low, min(self._high, self._low + len(match.text) + 1)):
            new = match.all_ends(self.part, new) & ~result
            if not new:
                break
            result |= new
        return result


class Look(Part):
    """`(?=a)`, `(?!a)` and, from `back` characters before, `(?<=a)`, `(?<!a)`."""

    def __init__(self, part: Part, back: int, wanted: bool) -> None:
        self._part, self._back, self._wanted = part, back, wanted

    def ways(self, length: int) -> float:
        return 1 + self._part.ways(length)

    def ends(self, match: Match, start: int) -> int:
        begin = start - self._back
        ends = match.ends(self._part, begin) if begin >= 0 else 0
        found = ends >> start & 1 if self._back else ends
        return 1 << start if bool(found) == self._wanted else 0


class Other(Part):
    """What only Python's matcher knows, and is left to it where the rest has few ways."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def ways(self, length: int) -> float:
        return float("inf") if "GROUP" in self._kind and "REF" not in self._kind else 1

    def ends(self, match: Match, start: int) -> int:
        raise TooLong
