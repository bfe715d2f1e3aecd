"""Turns pydantic's validation errors into sentences about the recipe, each with its place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qcompile.recipe.schema import Calibration, FormatName, Granularity, Metadata, Recipe, Rule

Path = tuple[str | int, ...]

_MODELS: dict[Path, type[BaseModel]] = {
    (): Recipe,
    ("metadata",): Metadata,
    ("calibration",): Calibration,
    ("rules",): Rule,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(FormatName),
    "granularity": get_args(Granularity),
    "algorithm": get_args(Calibration.model_fields["algorithm"].annotation),
}
_EXPECTED = {
    "model_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "text (quote it?)",
    "bool_type": "true or false",
    "int_type": "a whole number",
}


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing if no known word is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def show_path(path: Path) -> str:
    """("rules", 2, "format") -> `rules[2].format`; the recipe itself is `the recipe`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "the recipe"


def diagnose(error: ValidationError, place: Callable[[Path], str]) -> str:
    """One line per problem: `place(path): message`, in the order of the file as far as pydantic keeps it."""
    lines = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic counts only the valid items; the invalid ones have errors of their own
        path = detail["loc"] + tuple(detail.get("ctx", {}).get("path", ()))
        lines.append(f"{place(path)}: {_sentence(detail, path)}")
    return "\n".join(dict.fromkeys(lines))


def _sentence(detail: ErrorDetails, path: Path) -> str:
    kind, found = detail["type"], detail["input"]
    owner, key = path[:-1], path[-1] if path else ""
    context: dict[str, Any] = detail.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        known = tuple(_MODELS[tuple(part for part in owner if isinstance(part, str))].model_fields)
        return f"unknown key {key!r} in {show_path(owner)}{did_you_mean(key, known) or '; known: ' + ', '.join(known)}"
    if kind == "missing":
        return f"{show_path(owner)} lacks the key {key!r}"
    if kind == "literal_error":
        choices = _CHOICES[str(key)]
        known_ones = ", ".join(choices) + did_you_mean(found, choices)
        return f"unknown {key} {found!r} at {show_path(path)}; known: {known_ones}"
    if kind == "recipe":
        return f"{show_path(path)}: {context['message']}"
    if kind in ("too_short", "too_long"):
        return f"{show_path(path)} has {context['actual_length']} items; {_length(context)}"
    if kind == "string_too_short":
        return f"{show_path(path)} is empty"
    if kind in _EXPECTED:
        return f"{show_path(path)} must be {_EXPECTED[kind]}, not {found!r}"
    return f"{show_path(path)}: {detail['msg']}, found {found!r}"


def _length(context: dict[str, Any]) -> str:
    if "max_length" in context:
        return f"at most {context['max_length']} are allowed"
    return f"at least {context['min_length']} needed"
