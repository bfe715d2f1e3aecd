"""What algorithms try scales with is what programs compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.algorithms.simulate import rounded
from qcompile.recipe import resolve
from qcompile.recipe.match import QuantizerName


@pytest.mark.parametrize("fmt", ["nvfp4", "int4", "mxfp8", "mxfp4"])
def test_blocks_are_rounded_as_in_the_program(fmt: str) -> None:
    torch.manual_seed(0)
    model, eye = nn.Sequential(nn.Linear(128, 8, bias=False)).eval(), torch.eye(128)
    model[0].weight.data[1] *= 37
    rules = [f"rules=[{{quantizer: '*.weight_quantizer', format: {fmt}}}]", "calibration={algorithm: max}"]
    recipe = qcompile.load_recipe("nvfp4_weight_only", rules)
    program = qcompile.quantize(model, (eye,), recipe=recipe, dtype=torch.float32, progress=False)
    weight = model[0].weight.detach()
    name = QuantizerName("0.weight_quantizer", "torch.nn.modules.linear.Linear")
    config = resolve(recipe, [name]).configs[name.name]
    with torch.no_grad():
        assert torch.equal(rounded(weight, config, weight.abs().max()), program.module()(eye).T)
