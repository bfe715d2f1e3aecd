"""Recipes: YAML that says which quantizers of a model are on, and in which format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public

if TYPE_CHECKING:
    from qcompile.algorithms.settings import MaxSettings, Settings
    from qcompile.recipe.check import check_recipe
    from qcompile.recipe.empty import check_quantizes
    from qcompile.recipe.files import fragment_path, list_fragments, list_recipes, recipe_path
    from qcompile.recipe.imports import fragment_description
    from qcompile.recipe.load import RecipeSource, load_recipe, path_of
    from qcompile.recipe.match import QuantizerName, Resolution, resolve
    from qcompile.recipe.notices import Notice
    from qcompile.recipe.overrides import with_overrides
    from qcompile.recipe.rule import Location, Rule
    from qcompile.recipe.schema import Metadata, Recipe
    from qcompile.recipe.write import expanded_yaml
    from qcompile.schemes.config import QuantizerConfig, format_of, unsupported

__all__ = [
    "Location",
    "MaxSettings",
    "Metadata",
    "Notice",
    "QuantizerConfig",
    "QuantizerName",
    "Recipe",
    "RecipeSource",
    "Resolution",
    "Rule",
    "Settings",
    "check_quantizes",
    "check_recipe",
    "expanded_yaml",
    "format_of",
    "fragment_description",
    "fragment_path",
    "list_fragments",
    "list_recipes",
    "load_recipe",
    "path_of",
    "recipe_path",
    "resolve",
    "unsupported",
    "with_overrides",
]

_PLACES = {
    "Location": "qcompile.recipe.rule",
    "MaxSettings": "qcompile.algorithms.settings",
    "Metadata": "qcompile.recipe.schema",
    "Notice": "qcompile.recipe.notices",
    "QuantizerConfig": "qcompile.schemes.config",
    "QuantizerName": "qcompile.recipe.match",
    "Recipe": "qcompile.recipe.schema",
    "RecipeSource": "qcompile.recipe.load",
    "Resolution": "qcompile.recipe.match",
    "Rule": "qcompile.recipe.rule",
    "Settings": "qcompile.algorithms.settings",
    "check_quantizes": "qcompile.recipe.empty",
    "check_recipe": "qcompile.recipe.check",
    "expanded_yaml": "qcompile.recipe.write",
    "format_of": "qcompile.schemes.config",
    "fragment_description": "qcompile.recipe.imports",
    "fragment_path": "qcompile.recipe.files",
    "list_fragments": "qcompile.recipe.files",
    "list_recipes": "qcompile.recipe.files",
    "load_recipe": "qcompile.recipe.load",
    "path_of": "qcompile.recipe.load",
    "recipe_path": "qcompile.recipe.files",
    "resolve": "qcompile.recipe.match",
    "unsupported": "qcompile.schemes.config",
    "with_overrides": "qcompile.recipe.overrides",
}

__getattr__, __dir__ = public(__name__, _PLACES)
