"""The regular expressions in lists of modules, which strangers wrote: Python's, matched in bounded time.

Python's matcher tries every way in which the parts of a pattern can share a text, and there are exponentially many for
`(a|aa)+$`. A pattern whose ways are few, counted from its parts, is left to it. Others are matched here by what is the
same for all ways, the set of places at which a part can end when it begins at one place: as many sets as parts times
characters, each computed once.
"""

from __future__ import annotations

import importlib
import re
import time
from itertools import groupby
from typing import Any

from qcompile.checkpoint.formats.regex_parts import Branch, Leaf, Look, Match, Other, Part, Repeat, Sequence, TooLong
from qcompile.errors import CheckpointError
from qcompile.messages import value

LONGEST_PATTERN, MOST_GROUPS = 1_000, 100
MOST_WAYS = 300_000  # of Python's matcher, times parts: milliseconds
MOST_SECONDS = 5.0  # of a processor, for all matches; real checkpoints of 50,000 layers need less than one

# The tree that `re` makes of a pattern, so that here is matched what `re` would match; not public, not annotated.
_parser: Any = importlib.import_module("re._parser")
_compiler: Any = importlib.import_module("re._compiler")
_LEAVES = ("NOT_LITERAL", "ANY", "IN", "AT")


class Clock:
    """The time that the matches of one checkpoint take together. Raises `CheckpointError` when it is over."""

    def __init__(self) -> None:
        self._spent = 0.0

    def matches(self, pattern: Regex, name: str) -> bool:
        start = time.thread_time()
        found = pattern.matches(name)
        self._spent += time.thread_time() - start
        if self._spent > MOST_SECONDS:
            raise CheckpointError(f"the regular expressions take more than {MOST_SECONDS:.0f} s, {pattern} among them")
        return found


class Regex:
    """One pattern, matched from the start of a name as `re.match` does."""

    def __init__(self, text: str) -> None:
        """Raises `CheckpointError` for what is no pattern, and for one that is too long."""
        if len(text) > LONGEST_PATTERN:
            raise CheckpointError(f"{value(text)}: a regular expression has at most {LONGEST_PATTERN} characters")
        if text.count("(") > MOST_GROUPS:  # how deep Python goes depends on what else the process has set
            raise CheckpointError(f"{value(text)}: a regular expression has at most {MOST_GROUPS} groups")
        self.text = text
        try:
            self._compiled = re.compile(text)
            parsed = _parser.parse(text)
            self._flags: int = parsed.state.flags
            self._tree = self._sequence(parsed, self._flags)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{self} is no regular expression: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return value(f"re:{self.text}")

    def matches(self, name: str) -> bool:
        """Raises `CheckpointError` where that would take too long."""
        if self._tree.ways(len(name)) * (len(self.text) + 1) <= MOST_WAYS:
            return self._compiled.match(name) is not None
        try:
            return Match(name).ends(self._tree, 0) != 0
        except (TooLong, RecursionError) as error:
            raise CheckpointError(f"{self} takes too long to match {value(name)}: write it in a simpler way") from error

    def _sequence(self, parsed: Any, flags: int) -> Part:
        parts: list[Part] = []
        for literal, items in groupby(parsed, lambda item: str(item[0]) == "LITERAL"):
            if literal:
                word = list(items)
                self._end_before(parts, chr(word[0][1]))
                parts.append(self._leaf(parsed.state, word, flags, characters=len(word)))
            else:
                parts += [self._part(parsed.state, item, flags) for item in items]
        return Sequence(parts) if len(parts) != 1 else parts[0]

    def _end_before(self, parts: list[Part], character: str) -> None:
        """`\\d+\\.` can end in one place only."""
        if parts and isinstance(parts[-1], Repeat) and isinstance(parts[-1].part, Leaf):
            parts[-1].single = not parts[-1].part.takes(character)

    def _leaf(self, state: Any, items: list[Any], flags: int, characters: int) -> Leaf:
        return Leaf(_compiler.compile(_parser.SubPattern(state, items), flags), characters)

    def _part(self, state: Any, item: Any, flags: int) -> Part:
        kind, argument = str(item[0]), item[1]
        if kind in _LEAVES:
            return self._leaf(state, [item], flags, characters=0 if kind == "AT" else 1)
        if kind == "SUBPATTERN":
            _, added, removed, inner = argument
            return self._sequence(inner, (flags | added) & ~removed)
        if kind == "BRANCH":
            return Branch([self._sequence(option, flags) for option in argument[1]])
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = argument
            return Repeat(self._sequence(inner, flags), low, high)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, inner = argument
            back = inner.getwidth()[0] if direction < 0 else 0
            return Look(self._sequence(inner, flags), back, kind == "ASSERT")
        return Other(kind)  # back references, atomic groups
