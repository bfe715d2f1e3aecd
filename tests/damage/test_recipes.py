"""Recipes that somebody else wrote, or damaged: read, checked and matched, or refused in one clear sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from qcompile.errors import RecipeError
from qcompile.recipe import check_recipe, list_recipes, load_recipe, recipe_path
from qcompile.recipe.asked import asked_formats, calibrates
from qcompile.recipe.files import fragment_path, list_fragments
from qcompile.recipe.globs import KINDS
from qcompile.recipe.match import QuantizerName, resolve
from qcompile.recipe.write import expanded_yaml
from tests.damage.support import judge, mutated_bytes, mutated_tree

NAMES = [
    QuantizerName(f"model.layers.{layer}.{module}.{kind}", "torch.nn.modules.linear.Linear")
    for layer in range(3)
    for module in ("self_attn.q_proj", "mlp.down_proj", "self_attn", "norm")
    for kind in KINDS
]


def use(path: Path) -> None:
    """All that is done with a recipe; its expanded form has to be the same recipe."""
    recipe = load_recipe(path)
    copy = path.with_suffix(".copy.yaml")
    copy.write_text(expanded_yaml(recipe), encoding="utf-8")
    try:
        again = load_recipe(copy)
    except RecipeError as error:
        raise AssertionError(f"its expanded form is refused: {error}") from error
    assert again == recipe
    asked_formats(recipe)
    calibrates(recipe)
    check_recipe(recipe)
    resolve(recipe, NAMES)


@pytest.mark.slow
def test_mutated_recipes(tmp_path: Path) -> None:
    draw, cases = random.Random(16), []
    sources = [recipe_path(name) for name in list_recipes()]
    fragments = [fragment_path(name) for name in list_fragments()]
    for number in range(600):
        source = draw.choice(sources)
        text = source.read_bytes()
        if number % 3 == 0:
            changed = mutated_bytes(text, draw)
        elif number % 3 == 1:
            changed = yaml.safe_dump(mutated_tree(yaml.safe_load(text), draw)).encode()
        else:  # of a fragment, which the recipe imports
            fragment = tmp_path / f"fragment{number}.yaml"
            content = draw.choice(fragments).read_bytes()
            tree = yaml.safe_dump(mutated_tree(yaml.safe_load(content), draw)).encode()
            fragment.write_bytes(draw.choice((mutated_bytes(content, draw), tree)))
            changed = text + f"  - import: ./{fragment.name}\n".encode()
        case = tmp_path / f"{number}.yaml"
        case.write_bytes(changed)
        cases.append(case)
    outcomes = judge(cases, use)
    assert min(outcomes["right"], outcomes["refused"]) > 50, outcomes
