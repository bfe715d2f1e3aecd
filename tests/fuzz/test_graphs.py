"""Random networks through every recipe, target and dtype: right numbers, or one clear error."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.recipe import list_recipes
from tests.fuzz.generator import network
from tests.fuzz.judge import check

RECIPES = list_recipes()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNSHRUNK = (Phase.reuse, Phase.generate)  # a smaller seed is no smaller network
# Refusals that are right, by a part of their sentence: ONNX has no such form, or the recipe names nothing here.
EXPECTED = ("unsupported type: tensor(bfloat16)", "quantizes nothing", "numbers that the program cannot hold")


def run_seeds(seeds: range, folder: Path) -> None:
    """Checks the networks of `seeds`; each gets a recipe, a dtype and a target by its seed."""
    refused: Counter[str] = Counter()
    for seed in seeds:
        draw = random.Random(-seed)
        recipe, dtype = draw.choice(RECIPES), draw.choice(DTYPES)
        target = draw.choice(("tensorrt", "portable"))
        case = network(seed)
        try:
            outcome = check(case, recipe, dtype, target, folder)
        except Exception as error:
            error.add_note(f"{case}, recipe {recipe}, {dtype}, {target}")
            raise
        if outcome.refused and not any(known in outcome.refused for known in EXPECTED):
            refused[f"{case}, recipe {recipe}, {dtype}, {target}: {outcome.refused}"] += 1
    assert not refused, refused


def test_random_networks(tmp_path: Path) -> None:
    run_seeds(range(2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 50))
def test_two_thousand_random_networks(first: int, tmp_path: Path) -> None:
    run_seeds(range(first, first + 50), tmp_path)


@pytest.mark.slow
@settings(max_examples=5, phases=UNSHRUNK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(2000, 2**31))
def test_a_network_of_any_seed(seed: int, tmp_path: Path) -> None:
    """Beyond those above: `.ci/find` tries other ones each time."""
    run_seeds(range(seed, seed + 1), tmp_path)
