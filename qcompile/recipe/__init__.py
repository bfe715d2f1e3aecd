"""Recipes: YAML that says which quantizers of a model are on, and in which format."""

from __future__ import annotations

from qcompile.recipe.check import check_recipe
from qcompile.recipe.load import RecipeSource, list_recipes, load_recipe, recipe_path
from qcompile.recipe.match import QuantizerConfig, QuantizerName, Resolution, resolve, unsupported
from qcompile.recipe.notices import Notice
from qcompile.recipe.overrides import with_overrides
from qcompile.recipe.schema import Calibration, Location, Metadata, Recipe, Rule

__all__ = [
    "Calibration",
    "Location",
    "Metadata",
    "Notice",
    "QuantizerConfig",
    "QuantizerName",
    "Recipe",
    "RecipeSource",
    "Resolution",
    "Rule",
    "check_recipe",
    "list_recipes",
    "load_recipe",
    "recipe_path",
    "resolve",
    "unsupported",
    "with_overrides",
]
