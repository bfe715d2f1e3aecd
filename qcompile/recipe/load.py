"""Recipes from shipped names, YAML files, mappings; every error says file, line and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from qcompile.recipe.diagnose import show_path
from qcompile.recipe.files import list_recipes, looks_like_path, read, recipe_path
from qcompile.recipe.imports import Written, in_file, recipe_of
from qcompile.recipe.overrides import with_overrides
from qcompile.recipe.rule import Location
from qcompile.recipe.schema import Recipe

RecipeSource = str | os.PathLike[str] | Mapping[str, object] | Recipe


def load_recipe(source: RecipeSource, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that `source` stands for, validated, with its imports resolved.

    Args:
        source: a shipped name ("fp8"), one with fragments behind it ("fp8+fp8_kv"), a path to a YAML file, a mapping of
            the same shape, or a `Recipe`.
            A string is a path if it is no shipped name and has a suffix .yaml or .yml, a separator, or exists.
        overrides: `--set` expressions, see `with_overrides`.

    Raises:
        RecipeError: one message with a line `file:line: problem` for each problem.
    """
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, Mapping):
        recipe = recipe_of(
            Written(dict(source), lambda path: "recipe mapping", lambda i: Location(show_path(("rules", i))))
        )
    else:
        base, *fragments = _parts(source)
        path = path_of(base)
        recipe = recipe_of(_with_fragments(in_file(read(path, "recipe"), path), fragments))
    return with_overrides(recipe, overrides)


def _parts(source: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """`fp8+fp8_kv` -> `fp8`, `fp8_kv`; a path, which may have a plus in it, is one part."""
    if isinstance(source, str) and "+" in source and not looks_like_path(source) and not os.path.exists(source):
        return [*map(str.strip, source.split("+"))]
    return [source]


def _with_fragments(text: Written, fragments: Iterable[str | os.PathLike[str]]) -> Written:
    """`text` with imports of `fragments` behind its rules, and their names behind its own."""
    names = [str(name) for name in fragments]
    if not names or not isinstance(text.data, dict):
        return text
    rules = [*(text.data.get("rules") or ()), *({"import": name} for name in names)]
    metadata = dict(text.data.get("metadata") or {})
    metadata["name"] = "+".join([str(metadata.get("name", "")), *names])
    return replace(text, data={**text.data, "metadata": metadata, "rules": rules})


def path_of(source: str | os.PathLike[str]) -> Path:
    """The YAML file of a shipped name or a path. Raises `RecipeError` for what looks like an unknown name."""
    if isinstance(source, str):
        is_path = source not in list_recipes() and (looks_like_path(source) or os.path.exists(source))
        return Path(source) if is_path else recipe_path(source)
    return Path(source)
