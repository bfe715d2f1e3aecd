"""Random networks through torch.compile: the numbers of the quantized program, or explain says what was left."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import qcompile
from qcompile.recipe import list_recipes
from qcompile.report import quantized_modules
from tests.fuzz.generator import Case, network
from tests.fuzz.judge import ROUNDING, hold, leaves

RECIPES = list_recipes()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(case: Case, recipe: str, dtype: torch.dtype, target: str) -> str:
    """Compiles and runs `case`; asserts that numbers and layers are those of the program. Returns why it was refused.

    Raises:
        AssertionError: a wrong number. Anything that is no QCompileError is a fault, too.
    """
    torch._dynamo.reset()
    with torch.no_grad():
        floats = leaves(case.model(*case.inputs))
        model = case.model.to(dtype)
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs)
        try:
            state = qcompile.calibrate(model, inputs, recipe=recipe, calibration=[inputs], progress=False)
            program = qcompile.quantize(model, inputs, recipe=recipe, calibration=state, dtype=dtype, progress=False)
        except qcompile.QCompileError as error:
            return f"{type(error).__name__}: {error}"
        options = {"recipe": recipe, "calibration": state, "target": target}
        dynamic = True if case.dynamic_shapes else None
        run: Any = torch.compile(model, backend="qcompile", dynamic=dynamic, options=options)
        found = leaves(run(*inputs))
        wanted = leaves(program.module()(*inputs))
    hold(found, wanted, floats, dtype, f"torch.compile, {target}", ROUNDING[dtype])
    assert [result.dtype for result in found] == [result.dtype for result in wanted]
    quantized, _ = quantized_modules(program.graph_module)
    explained = qcompile.explain(run)
    known = len(explained.quantized) + len(explained.left)  # a weight that no module multiplies has two names
    assert known >= len(quantized), f"of {sorted(quantized)} explain knows {sorted(explained.quantized)}"
    return ""


def run_seeds(seeds: range, target: str) -> None:
    """Checks the networks of `seeds`; each gets a recipe and a dtype by its seed."""
    refused: list[str] = []
    for seed in seeds:
        draw = random.Random(-seed - 1)
        recipe, dtype = draw.choice(RECIPES), draw.choice(DTYPES)
        case = network(seed)
        try:
            said = check(case, recipe, dtype, target)
        except Exception as error:
            error.add_note(f"{case}, recipe {recipe}, {dtype}, {target}")
            raise
        if said and "quantizes nothing" not in said:
            refused.append(f"{case}, recipe {recipe}, {dtype}: {said}")
    assert not refused, refused


def test_random_networks() -> None:
    run_seeds(range(2), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_a_thousand_random_networks(first: int) -> None:
    run_seeds(range(first, first + 50), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_a_hundred_random_networks_by_inductor(first: int) -> None:
    run_seeds(range(first, first + 10), "inductor")
