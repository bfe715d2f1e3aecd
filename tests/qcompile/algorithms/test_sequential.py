"""`sequential: true`: a block is solved with the inputs that quantized blocks before it give, by a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompile.quantization.sequential import segment_of
from qcompile.report.record import record_of
from tests.qcompile.algorithms.test_gptq import inputs, paper, quantized, recipe, weights_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * self.gate(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_block_is_solved_behind_quantized_ones() -> None:
    model, x = Blocks().eval(), inputs(200, 32) / 4
    found = {}
    for sequential in (False, True):
        program = quantized(model, [x[:50], x[50:]], weight_only(sequential), torch.float32)
        found[sequential] = weights_of(program)
        notices = record_of(program).notices
        assert not any("nothing else" in notice or "not used" in notice for notice in notices)
        assert sum("so few tokens" in notice for notice in notices) == 0
    first = ("layers.0.up.weight", "layers.0.gate.weight", "layers.0.down.weight")
    assert all(torch.equal(found[True][n][0], found[False][n][0]) for n in first)
    later = [n for n in found[True] if n not in first]
    assert any(not torch.equal(found[True][n][0], found[False][n][0]) for n in later) and len(later) == 4
    with torch.no_grad():
        for name in first:  # as the first block computes when it is quantized
            model.get_parameter(name).copy_(found[True][name][0] * found[True][name][1])
        behind = model.layers[0](x)
        numbers, scale = found[True]["layers.1.up.weight"]
        weight = model.get_parameter("layers.1.up.weight").numpy()
        expected = paper(weight, behind.double().numpy(), scale.double().numpy(), "int8", 0.01, "none")
    np.testing.assert_array_equal(numbers.numpy(), expected)


def weight_only(sequential: bool) -> dict[str, object]:
    step = {"algorithm": "gptq", "order": "none", "scales": "max", "double": True, "sequential": sequential}
    rule = {"quantizer": "*.weight_quantizer", "format": "int8", "granularity": "per_channel"}
    return {"metadata": {"name": "weights", "description": "Weights in INT8."}, "calibration": step, "rules": [rule]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nvfp4", "fp8"])
@pytest.mark.parametrize("algorithm", ["gptq", "hessian_mse"])
def test_activations_are_quantized_in_front_of_a_block(name: str, algorithm: str) -> None:
    model, x, found = Blocks().eval(), inputs(64, 32) / 4, {}
    for sequential in (False, True):
        chosen = recipe(name, algorithm=algorithm, sequential=str(sequential).lower())
        program = quantized(model, list(x.split(16)), chosen, torch.float16)
        found[sequential] = program.state_dict
        few = [notice for notice in record_of(program).notices if "so few tokens" in notice]
        assert len(few) == (algorithm == "gptq")
    assert found[True].keys() == found[False].keys()
    differ = {n for n, t in found[True].items() if not torch.equal(t.float(), found[False][n].float())}
    assert not any(n.startswith("layers.0") for n in differ)
    assert algorithm != "gptq" or any(n.startswith("layers.1") for n in differ)


def test_segments_are_the_blocks_that_repeat() -> None:
    names = ["embed", "layers.0.attn.q", "layers.11.mlp.experts.3.up", "0.proj", "blocks.2", "head"]
    assert [segment_of(n) for n in names] == ["embed", "layers.0", "layers.11", "0", "blocks.2", "head"]
