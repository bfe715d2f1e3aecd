"""Q, K and V, gate and up in FP8 blocks: rows of blocks are joined where they fit, else each row gets its scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.constants import evaluate_constant
from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_1X128, FP8_128X128
from passes.graph import aten, calls, shape
from passes.ir import DEQUANTIZE
from passes.legalize.k_split import SplitK
from passes.normalize.views import ViewsToReshape
from passes.place.merge_linears import MergeParallelLinears
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.blocks import INPUT, WEIGHT, block_graph, error, oracle
from tests.passes.support import Attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class GateUp(nn.Module):
    def __init__(self, width: int, columns: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, columns, bias=bias), nn.Linear(width, columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).relu() * self.up(x)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("columns", [128, 256, 192, 70])
@pytest.mark.parametrize("width", [256, 100])
def test_gate_and_up(columns: int, width: int) -> None:
    gm = block_graph(GateUp(width, columns), torch.randn(4, width), dynamic_shapes=({0: DYNAMIC},))
    rewrites(MergeParallelLinears, gm, torch.randn(7, width), **TOLERANCE)
    (weight,) = (n for n in calls(gm.graph, DEQUANTIZE) if shape(n) == (2 * columns, width))
    fits = columns % 128 == 0
    assert weight.kwargs["format"] == (FP8_128X128 if fits else FP8_1X128).name
    rows = 2 * columns // 128 if fits else 2 * columns
    assert evaluate_constant(gm, weight.args[1]).shape == (rows, -(-width // 128))  # type: ignore[arg-type]
    rewrites(SplitK, gm, torch.randn(7, width), **TOLERANCE)
    FoldConstants()(gm)
    assert (count(gm, aten.matmul.default), count(gm, aten.cat.default)) == (1, 0)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("width", [64, 96])
def test_projections_of_different_widths(kv_heads: int, width: int) -> None:
    """Heads of 64 or 96: the key's rows start in the middle of a block, or not."""
    gm = graph_of(nn.Sequential(Attention(2, width, kv_heads)), torch.randn(2, 5, 2 * width))
    ViewsToReshape()(gm)
    quantizers = {"weight": WEIGHT, "input": INPUT}
    InsertQdq({s: quantizers[s.operand] for s in find_sites(gm) if s.operand in quantizers})(gm)
    FoldWeights()(gm)
    rewrites(MergeParallelLinears, gm, torch.randn(2, 5, 2 * width), **TOLERANCE)
    assert count(gm, aten.linear.default) == 1
    rewrites(SplitK, gm, torch.randn(2, 5, 2 * width), rtol=1e-4, atol=1e-4)


def test_every_row_has_the_scales_of_its_own_block() -> None:
    """Layers of very different size: a row with the scale of its neighbour would be off by a thousand."""
    module = GateUp(256, 200).half()
    with torch.no_grad():
        module.up.weight *= 1000
    x = torch.randn(8, 256).half()
    gm = block_graph(module, x)
    MergeParallelLinears()(gm)
    SplitK()(gm)
    (got,) = run(gm, x)
    gate, up = oracle(x, module.gate.weight), oracle(x, module.up.weight, module.up.bias)
    assert error(got, gate.clip(0) * up) <= 2e-3


def test_another_granularity_beside_it_is_declined() -> None:
    module = GateUp(256, 128)
    gm = graph_of(module, torch.randn(4, 256))
    per_tensor = Quantizer(FP8, torch.tensor(0.01))
    own = {"gate.weight": WEIGHT, "up.weight": per_tensor, "gate.input": INPUT, "up.input": INPUT}
    sites = {s: own.get(f"{s.module}.{s.operand}") for s in find_sites(gm)}
    InsertQdq({s: quantizer for s, quantizer in sites.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    assert declines(MergeParallelLinears, gm) == ["their weights are quantized to different formats or granularities"]
