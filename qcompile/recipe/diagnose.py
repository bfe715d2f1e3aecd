"""Turns pydantic's validation errors into sentences about the recipe, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qcompile.algorithms import ALGORITHMS
from qcompile.messages import cut, value
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import IMPORT_TAG, RULE_TAG, Fragment, Metadata
from qcompile.recipe.steps import is_tag, model_in
from qcompile.remedy import closest
from qcompile.schemes.words import FormatName, Granularity

Path = tuple[str | int, ...]

_MODELS: dict[str, type[BaseModel]] = {"metadata": Metadata, "rules": Rule}
_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(FormatName),
    "granularity": get_args(Granularity),
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
    close = closest(word, known)
    return f"; did you mean {close!r}?" if close else ""


def show_path(path: Path, root: str = "the recipe") -> str:
    """("rules", 2, "format") -> `rules[2].format`; nothing is `root`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{cut(str(part))}" for part in path)
    return text.lstrip(".") or root


def diagnose(
    error: ValidationError, place: Callable[[Path], str], whole: type[BaseModel], plain: Mapping[Path, str]
) -> str:
    """One line per problem: `place(path): message`, in the order of the file as far as pydantic keeps it.

    `whole` is the model that was validated: a recipe or a fragment; `plain` has what is written without quotes where
    YAML reads no text.
    """
    lines = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic counts only the valid items; the invalid ones have errors of their own
        path = _path(detail)
        path += tuple(detail.get("ctx", {}).get("path", ()))
        lines.append(f"{place(path)}: {_sentence(detail, path, whole, plain)}")
    return "\n".join(dict.fromkeys(lines))


def typos(error: ValidationError, whole: type[BaseModel]) -> dict[str, str]:
    """Words that are not known -> what was meant, where one comes near."""
    found = {}
    for detail in error.errors(include_url=False):
        path = _path(detail)
        if detail["type"] == "literal_error":
            word, known = detail["input"], _choices(detail)
        elif detail["type"] == "extra_forbidden" and IMPORT_TAG not in detail["loc"]:
            word, known = path[-1], _known_keys(detail, whole)
        else:
            continue
        # it becomes part of a shell command that is shown
        if (meant := closest(word, known)) and re.fullmatch(r"[\w-]+", str(word)):
            found[str(word)] = meant
    return found


def _path(detail: ErrorDetails) -> Path:
    """Where it is in what was written."""
    return tuple(part for part in detail["loc"] if part not in (RULE_TAG, IMPORT_TAG) and not is_tag(part))


def _model(detail: ErrorDetails, whole: type[BaseModel]) -> type[BaseModel]:
    """What holds the key that is wrong."""
    owner = [part for part in _path(detail)[:-1] if isinstance(part, str)]
    if not owner:
        return whole
    return model_in(detail["loc"]) if owner[0] == "calibration" else _MODELS[owner[0]]


def _known_keys(detail: ErrorDetails, whole: type[BaseModel]) -> tuple[str, ...]:
    model = _model(detail, whole)
    return (*model.model_fields, "import") if model is Rule else tuple(model.model_fields)


def _choices(detail: ErrorDetails) -> tuple[str, ...]:
    key = str(detail["loc"][-1])
    if key == "algorithm":
        return tuple(ALGORITHMS)
    return _CHOICES.get(key) or get_args(model_in(detail["loc"]).model_fields[key].annotation)


def _sentence(detail: ErrorDetails, path: Path, whole: type[BaseModel], plain: Mapping[Path, str]) -> str:
    kind, found = detail["type"], detail["input"]
    owner, key = path[:-1], path[-1] if path else ""
    root = "the fragment" if whole is Fragment else "the recipe"
    context: dict[str, Any] = detail.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        if IMPORT_TAG in detail["loc"]:
            also = f"it cannot have the key {value(key)} as well; add a rule after it"
            return f"{show_path(owner)} imports a fragment, {also}"
        known = _known_keys(detail, whole)
        hint = did_you_mean(key, known) or "; known: " + ", ".join(known)
        return f"unknown key {value(key)} in {show_path(owner, root)}{hint}"
    if kind == "missing":
        return f"{show_path(owner, root)} lacks the key {key!r}"
    if kind == "literal_error":
        choices = _choices(detail)
        known_ones = ", ".join(choices) + did_you_mean(found, choices)
        return f"unknown {key} {value(found)} at {show_path(path, root)}; known: {known_ones}"
    if kind == "recipe":
        return f"{show_path(path, root)}: {context['message']}"
    if kind in ("too_short", "too_long"):
        return f"{show_path(path, root)} has {context['actual_length']} items; {_length(context)}"
    if kind == "string_too_short":
        return f"{show_path(path, root)} is empty"
    if kind == "string_type" and path in plain:
        return _unquoted(found, show_path(path, root), str(key), plain[path])
    if kind == "bool_type" and isinstance(found, str) and found.lower() in ("true", "false", "on", "off", "yes", "no"):
        return f"{show_path(path, root)} must be true or false, without quotes, not {value(found)}"
    if kind in _EXPECTED:
        return f"{show_path(path, root)} must be {_EXPECTED[kind]}, not {value(found)}"
    return f"{show_path(path, root)}: {cut(detail['msg'], 300)}, found {value(found)}"


def _unquoted(found: object, where: str, key: str, written: str) -> str:
    """What to write for a text that YAML reads as a number, a date, true, false or nothing."""
    if found is None and not written:
        return f"{where} is empty"
    kind = {bool: str(found).lower(), type(None): "null", int: "a number", float: "a number"}.get(type(found), "a date")
    return f'{where} must be text, and YAML reads {cut(written)} as {kind}: quote it, {key}: "{cut(written)}"'


def _length(context: dict[str, Any]) -> str:
    if "max_length" in context:
        return f"at most {context['max_length']} are allowed"
    return f"at least {context['min_length']} needed"
