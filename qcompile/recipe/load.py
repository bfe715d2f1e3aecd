"""Recipes from shipped names, YAML files, mappings; every error says file, line and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
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
        source: a shipped name ("fp8"), a path to a YAML file, a mapping of the same shape, or a `Recipe`.
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
        path = path_of(source)
        recipe = recipe_of(in_file(read(path, "recipe"), path))
    return with_overrides(recipe, overrides)


def path_of(source: str | os.PathLike[str]) -> Path:
    """The YAML file of a shipped name or a path. Raises `RecipeError` for what looks like an unknown name."""
    if isinstance(source, str):
        is_path = source not in list_recipes() and (looks_like_path(source) or os.path.exists(source))
        return Path(source) if is_path else recipe_path(source)
    return Path(source)
