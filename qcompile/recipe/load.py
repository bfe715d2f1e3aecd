"""Recipes from shipped names, YAML files, mappings; every error says file, line and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath

from pydantic import ValidationError

from qcompile.errors import RecipeError
from qcompile.recipe.diagnose import diagnose, did_you_mean, show_path
from qcompile.recipe.overrides import with_overrides
from qcompile.recipe.schema import Location, Recipe
from qcompile.recipe.yaml_lines import Document, parse

_BUILTIN = FilePath(__file__).parent / "builtin"

RecipeSource = str | os.PathLike[str] | Mapping[str, object] | Recipe


def list_recipes() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in _BUILTIN.glob("*.yaml")))


def recipe_path(name: str) -> FilePath:
    """The YAML file of a shipped recipe, to show or to copy. Raises `RecipeError` for an unknown name."""
    known = list_recipes()
    if name not in known:
        others = f"shipped: {', '.join(known)}; or give a path to a YAML file"
        raise RecipeError(f"no recipe is called {name!r}; {others}{did_you_mean(name, known)}")
    return _BUILTIN / f"{name}.yaml"


def load_recipe(source: RecipeSource, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that `source` stands for, validated.

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
        recipe = _from_mapping(source)
    else:
        recipe = from_document(read_document(source))
    return with_overrides(recipe, overrides)


def read_document(source: str | os.PathLike[str]) -> Document:
    """Reads and parses the YAML file of a shipped name or a path."""
    path = FilePath(source)
    if isinstance(source, str) and (source in list_recipes() or not _looks_like_path(source)):
        path = recipe_path(source)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: a recipe is UTF-8 text, but byte {error.start} is not") from error
    return parse(text, _shown(path))


def from_document(document: Document) -> Recipe:
    """Validates a parsed file; the rules know their lines."""
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(diagnose(error, lambda path: f"{document.file}:{document.line(path)}")) from error
    return recipe.located([Location(document.file, document.line(("rules", i))) for i in range(len(recipe.rules))])


def _from_mapping(data: Mapping[str, object]) -> Recipe:
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(diagnose(error, lambda path: "recipe mapping")) from error
    return recipe.located([Location(show_path(("rules", i))) for i in range(len(recipe.rules))])


def _looks_like_path(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or os.sep in source or os.path.exists(source)


def _shown(path: FilePath) -> str:
    """Shipped files are shown without the machine's install path, which has no place in a report."""
    return f"qcompile/recipe/builtin/{path.name}" if path.parent == _BUILTIN else str(path)
