"""What would have worked in the place of what failed: an error carries it, and the command line shows it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from qcompile.errors import QCompileError

_Error = TypeVar("_Error", bound=QCompileError)
_LONGEST_WORD = 100


@dataclass(frozen=True)
class Remedy:
    """How the command has to change.

    Attributes:
        options: options with their values, in the place of what was given for them.
        typos: word -> what was meant.
        first: a shell command to run before it.
    """

    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    typos: Mapping[str, str] = field(default_factory=dict)
    first: str = ""


def with_remedy(error: _Error, remedy: Remedy) -> _Error:
    error.__dict__["remedy"] = remedy
    return error


def remedy_of(error: QCompileError) -> Remedy:
    found = error.__dict__.get("remedy")
    return found if isinstance(found, Remedy) else Remedy()


def closest(word: object, known: Iterable[str]) -> str | None:
    """What was meant by a word that is not known, if one comes near it."""
    if not isinstance(word, str) or len(word) > _LONGEST_WORD:
        return None
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def meant(word: str, known: Iterable[str]) -> Remedy:
    """`closest` as a remedy."""
    found = closest(word, known)
    return Remedy(typos={word: found} if found else {})
