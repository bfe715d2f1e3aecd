"""The recipe of a benchmark that is about kernels, bytes or times, which do not depend on how codes are chosen."""

from __future__ import annotations

from qcompile.recipe import Recipe, load_recipe


def of_max(recipe: str, *overrides: str) -> Recipe:
    """The rules of a recipe with the scales of `max`; one whose steps change the graph, which is a list, as it is."""
    plain = [] if len(load_recipe(recipe).steps) > 1 else ["calibration={algorithm: max}"]
    return load_recipe(recipe, [*plain, *overrides])
