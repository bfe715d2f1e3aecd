"""Q, K and V, gate and up: one linear layer where their weights allow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8, Format
from passes.graph import aten, module_path
from passes.ir import DEQUANTIZE
from passes.normalize.views import ViewsToReshape
from passes.place.merge_linears import MergeParallelLinears
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site, find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Attention, scale_of

S = torch.tensor(0.02)
# GEMMs of other sizes add up in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class GateUp(nn.Module):
    def __init__(self, gate: int = 12, up: int = 12, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, gate, bias=bias), nn.Linear(8, up, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x).relu(), self.up_proj(x)


def quantized(
    module: nn.Module, *inputs: Any, weight: Mapping[str, Any] | None = None, per_channel: bool = False, **options: Any
) -> GraphModule:
    """Inputs and weights of all linear layers as codes; `weight` gives a scale or a format of its own to some."""
    gm = graph_of(module, *inputs, **options)
    ViewsToReshape()(gm)

    def choose(site: Site) -> Quantizer:
        if site.operand == "input":
            return Quantizer(FP8, S)
        own = (weight or {}).get(site.module.rpartition(".")[2], S)
        fmt = own if isinstance(own, Format) else FP8
        scale = scale_of(gm.get_parameter(str(site.tensor.target)), fmt, per_channel=True) if per_channel else S
        return Quantizer(fmt, own if isinstance(own, Tensor) and not per_channel else scale)

    InsertQdq({site: choose(site) for site in find_sites(gm) if site.operand in ("input", "weight")})(gm)
    FoldWeights()(gm)
    return gm


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_projections_of_an_attention_become_one(per_channel: bool, kv_heads: int) -> None:
    """Whisper's k_proj has no bias, the others do: zeros stand in for it."""
    x = torch.randn(2, 5, 32)
    gm = quantized(nn.Sequential(Attention(4, 8, kv_heads)), x, per_channel=per_channel)
    rewrites(MergeParallelLinears, gm, x, **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, aten.split_with_sizes.default)) == (1, 1)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([4, kv_heads, kv_heads], 1)
    assert module_path(only_call(gm, aten.linear.default)) == "0.q_proj+k_proj+v_proj"
    FoldConstants()(gm)
    merged = only_call(gm, aten.linear.default)
    assert all(operand.op == "get_attr" for operand in merged.args[1].args)  # type: ignore[union-attr]
    assert merged.args[1].args[0].meta["val"].shape == (8 * (4 + 2 * kv_heads), 32)  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gate_and_up_become_one(bias: bool, dynamic: bool) -> None:
    gm = quantized(GateUp(bias=bias), torch.randn(3, 8), dynamic_shapes=({0: DYNAMIC},) if dynamic else None)
    rewrites(MergeParallelLinears, gm, torch.randn(7 if dynamic else 3, 8), **TOLERANCE)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([12, 12], -1)


def test_dynamic_attention() -> None:
    gm = quantized(
        Attention(), torch.randn(2, 5, 16), None, dynamic_shapes={"x": {0: DYNAMIC, 1: DYNAMIC}, "mask": None}
    )
    rewrites(MergeParallelLinears, gm, torch.randn(3, 4, 16), None, **TOLERANCE)


def test_layers_merge_whatever_the_order_of_the_readers() -> None:
    """Another pass may have made the last layer the first reader of the shared tensor."""
    x = torch.randn(3, 8)
    gm = quantized(GateUp(), x)
    gate = next(iter(gm.graph.find_nodes(op="call_function", target=aten.linear.default)))
    source = gate.args[0]
    gate.update_arg(0, gm.graph.find_nodes(op="placeholder")[0])
    gate.update_arg(0, source)
    assert next(iter(source.users)) is not gate  # type: ignore[union-attr]
    rewrites(MergeParallelLinears, gm, x, **TOLERANCE)


def test_another_user_of_a_result_gets_its_part() -> None:
    class Shared(GateUp):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            gate, up = self.gate_proj(x), self.up_proj(x)
            return gate.relu(), gate.sin(), up, x

    x = torch.randn(3, 8)
    rewrites(MergeParallelLinears, quantized(Shared(), x), x, **TOLERANCE)


def test_heads_that_are_read_twice_are_split_without_the_transpose() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            q, k = self.q(x).view(2, 3, 2, 4), self.k(x).view(2, 3, 1, 4)
            return q.transpose(1, 2), q.sin(), k

    x = torch.randn(2, 3, 8)
    gm = quantized(Twice(), x)
    rewrites(MergeParallelLinears, gm, x, **TOLERANCE)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([2, 1], 2)


@pytest.mark.parametrize(
    ("module", "weight", "reason"),
    [
        (GateUp(), {"gate_proj": INT8}, "different formats"),
        (GateUp(12, 16), {}, "differ in width"),
    ],
    ids=["formats", "widths"],
)
def test_layers_that_do_not_fit_are_declined(module: nn.Module, weight: dict[str, Any], reason: str) -> None:
    (found,) = declines(MergeParallelLinears, quantized(module, torch.randn(3, 8), weight=weight))
    assert reason in found


def test_scales_that_differ_become_scales_of_rows() -> None:
    gm = quantized(GateUp(), torch.randn(3, 8), weight={"gate_proj": torch.tensor(0.5)})
    rewrites(MergeParallelLinears, gm, torch.randn(3, 8), **TOLERANCE)
    weight = only_call(gm, aten.linear.default).args[1]
    assert tuple(weight.args[1].meta["val"].shape) == (24, 1)  # type: ignore[union-attr]


def test_layers_that_differ_in_granularity_are_declined() -> None:
    gm = graph_of(GateUp(), torch.randn(3, 8))
    scales = {"gate_proj": torch.tensor(0.02), "up_proj": torch.full((12, 1), 0.02)}
    InsertQdq({s: Quantizer(FP8, S if s.operand == "input" else scales[s.module])
               for s in find_sites(gm) if s.operand in ("input", "weight")})(gm)  # fmt: skip
    FoldWeights()(gm)
    (found,) = declines(MergeParallelLinears, gm)
    assert "granularities" in found


def test_layers_of_different_modules_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    gm = quantized(Two(), torch.randn(3, 8))
    assert declines(MergeParallelLinears, gm) == []
    assert count(gm, aten.linear.default) == 2


def test_float_layers_and_float_weights_stay_apart() -> None:
    gm = graph_of(GateUp(), torch.randn(3, 8))
    assert declines(MergeParallelLinears, gm) == []
    InsertQdq({s: Quantizer(FP8, S) for s in find_sites(gm) if s.operand == "input"})(gm)
    assert declines(MergeParallelLinears, gm) == []
    assert (count(gm, DEQUANTIZE), len(run(gm, torch.randn(3, 8)))) == (1, 2)
