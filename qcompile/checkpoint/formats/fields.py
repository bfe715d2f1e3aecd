"""Fields of a quantization configuration that somebody else wrote: of the type that they have to be, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompile.checkpoint.formats.regexes import LONGEST_PATTERN, Clock, Regex
from qcompile.errors import CheckpointError
from qcompile.messages import cut, value

MOST_PATTERNS = 1_000
_OF = "quantization configuration"


def names(section: Mapping[str, Any], key: str) -> list[str]:
    """Names and patterns of modules; none where the key is missing or null. Raises `CheckpointError` for others."""
    found = section.get(key)
    if found is None:
        return []
    if not isinstance(found, list | tuple):
        raise CheckpointError(f"{_OF}: {cut(key)} is {value(found)}, and has to be a list of names of modules")
    for name in found:
        if not isinstance(name, str) or len(name) > LONGEST_PATTERN:
            raise CheckpointError(f"{_OF}: {key} holds {value(name)}, which is no name of a module")
    return list(found)


def mapping(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; an empty one where the key is missing or null. Raises `CheckpointError` for others."""
    found = section.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{_OF}: {cut(key)} is {value(found)}, and has to be an object")
    return found


class Targets:
    """A list with names of modules, and with `re:` patterns that match from the start of a name.

    Attributes:
        names: those that are no patterns.
    """

    def __init__(self, entries: list[str], clock: Clock) -> None:
        self.names = {entry for entry in entries if not entry.startswith("re:")}
        patterns = dict.fromkeys(entry.removeprefix("re:") for entry in entries if entry.startswith("re:"))
        if len(patterns) > MOST_PATTERNS:
            raise CheckpointError(f"{len(patterns)} regular expressions in one list are more than {MOST_PATTERNS}")
        self._patterns, self._clock = [Regex(pattern) for pattern in patterns], clock

    def matches(self, name: str) -> bool:
        """Whether one of its patterns does."""
        return any(self._clock.matches(pattern, name) for pattern in self._patterns)
