"""Q, K and V, gate and up in NVFP4: codes and block scales are joined under one global scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.base import run_pipeline
from passes.constants import evaluate_constant
from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8, NVFP4
from passes.graph import aten, calls, dtype
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE
from passes.normalize.views import ViewsToReshape
from passes.place.merge_linears import MergeParallelLinears
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.nvfp4 import bits, oracle, unpacked
from tests.passes.support import Attention, insert

G = torch.tensor(0.0001)
# GEMMs of other sizes add up in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def folded(module: nn.Module, *inputs: Any, own: dict[str, Quantizer] | None = None, **options: Any) -> GraphModule:
    """Inputs and weights in NVFP4 under `G`, or the weight of a layer as `own` says."""
    gm = graph_of(module, *inputs, **options)
    ViewsToReshape()(gm)
    quantizers = {}
    for site in find_sites(gm):
        if site.operand in ("input", "weight"):
            leaf = site.module.rpartition(".")[2] if site.operand == "weight" else ""
            quantizers[site] = (own or {}).get(leaf, Quantizer(NVFP4, G))
    InsertQdq(quantizers)(gm)
    FoldWeights()(gm)
    return gm


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_projections_become_one_product(kv_heads: int) -> None:
    module = nn.Sequential(Attention(2, 16, kv_heads))
    dynamic = ({0: DYNAMIC},)
    gm = folded(module, torch.randn(2, 5, 32), dynamic_shapes=dynamic)
    rewrites(MergeParallelLinears, gm, torch.randn(3, 5, 32), **TOLERANCE)
    rewrites(FoldConstants, gm, torch.randn(3, 5, 32), fired=3, **TOLERANCE)
    # one quantize of the input; two levels of the input, two of the weight
    assert (count(gm, aten.linear.default), count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1, 4)
    weight = only_call(gm, aten.linear.default).args[1]
    codes, scale = weight.args  # type: ignore[union-attr]
    block_scales, global_scale = scale.args
    layers = [module[0].q_proj, module[0].k_proj, module[0].v_proj]
    rows = np.concatenate([layer.weight.detach().numpy() for layer in layers])
    expected_codes, expected_scales = oracle(rows, G)
    stored = gm.state_dict()
    np.testing.assert_array_equal(unpacked(stored[codes.target]), expected_codes)
    np.testing.assert_array_equal(bits(stored[block_scales.target]), bits(expected_scales))
    assert stored[global_scale.target] == G
    read = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    assert [name for name in read if stored[name].dtype is torch.uint8] == [codes.target]


class GateUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x).relu() * self.up_proj(x)


def test_gate_and_up_become_one() -> None:
    gm = folded(GateUp(), torch.randn(3, 32))
    rewrites(MergeParallelLinears, gm, torch.randn(3, 32), **TOLERANCE)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([48, 48], -1)


def test_unequal_formats_are_declined() -> None:
    gm = folded(GateUp(), torch.randn(3, 32), own={"gate_proj": Quantizer(FP8, G)})
    (found,) = declines(MergeParallelLinears, gm)
    assert "different formats" in found


@pytest.mark.parametrize("bias", [False, True])
def test_unequal_global_scales_become_a_factor_behind(bias: bool) -> None:
    module, x = GateUp(), torch.randn(3, 32)
    if bias:
        module.gate_proj = nn.Linear(32, module.gate_proj.out_features)
    gm = folded(module, x, own={"gate_proj": Quantizer(NVFP4, torch.tensor(0.0002))})
    rewrites(MergeParallelLinears, gm, x, **TOLERANCE)
    only_call(gm, aten.linear.default)


def test_a_float_layer_beside_them_stays_apart() -> None:
    class Three(GateUp):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.router(x)

    module, x = Three(), torch.randn(3, 32)
    gm = graph_of(module, x)
    chosen = [s for s in find_sites(gm) if s.operand in ("input", "weight") and s.module != "router"]
    InsertQdq({site: Quantizer(NVFP4, G) for site in chosen})(gm)
    FoldWeights()(gm)
    rewrites(MergeParallelLinears, gm, x, **TOLERANCE)
    assert count(gm, aten.linear.default) == 2
    assert torch.equal(run(gm, x)[1], module.router(x))


def test_merged_codes_are_not_copied() -> None:
    """The program that a file is made of keeps its weights: of a copy, a large model's codes would be there twice."""

    class GateUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate_proj(x).relu() * self.up_proj(x)

    gm = graph_of(GateUp(), torch.randn(2, 32))
    insert(gm, {"weight": torch.tensor(1e-3), "input": torch.tensor(1e-3)}, NVFP4)
    run_pipeline((FoldWeights, MergeParallelLinears), gm)
    parts = [gm.get_parameter(f"{name}_proj.weight") for name in ("gate", "up")]
    codes = next(node for node in calls(gm.graph, aten.cat.default) if dtype(node) is torch.uint8)
    joined = evaluate_constant(gm, codes)
    assert torch.equal(joined, torch.cat(parts))
    assert joined.data_ptr() == parts[0].data_ptr()
    moved = nn.Parameter(parts[0].clone(), requires_grad=False)
    gm.gate_proj.weight = moved
    assert torch.equal(evaluate_constant(gm, codes), torch.cat([moved, parts[1]]))
