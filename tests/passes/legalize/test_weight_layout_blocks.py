"""Weights with blocks along K, and those of experts, in a plain matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT4_COLUMNS, INT4_GROUPS, INT8, NVFP4, Format
from passes.graph import aten, calls, module_path, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, dynamic_quantize
from passes.legalize.weight_layout import StoreWeightsTransposed
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, graph_of, only_call, rewrites
from tests.passes.blocks import block_graph
from tests.passes.support import insert

G = torch.tensor(0.0005)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Experts(nn.Module):
    """Three experts, which read rows of their own or all the same ones."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 32))
        self.bias = nn.Parameter(torch.randn(3, 6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qcompile.batched_linear(x, self.weight, self.bias)


def folded(module: nn.Module, x: Tensor, scale: Tensor, fmt: Format) -> GraphModule:
    gm = graph_of(module, x, dynamic_shapes=({1 if x.ndim == 3 else 0: DYNAMIC},))
    insert(gm, {"weight": scale}, fmt)
    FoldWeights()(gm)
    return gm


@pytest.mark.parametrize("bias", [False, True])
def test_packed_codes_stay_and_their_values_are_transposed(bias: bool) -> None:
    gm = folded(nn.Linear(32, 6, bias=bias), torch.randn(2, 32), G, NVFP4)
    rewrites(StoreWeightsTransposed, gm, torch.randn(5, 32), **TOLERANCE)
    assert not FoldConstants()(gm).modified  # a transpose of a dequantize is evaluated by nobody
    product = only_call(gm, aten.matmul.default)
    transpose = product.args[1]
    assert transpose.target is aten.transpose.int and transpose.args[0].target is DEQUANTIZE  # type: ignore[union-attr]
    assert gm.get_parameter("weight").shape == (6, 16)
    assert count(gm, aten.add.Tensor) == bias


class ExpertsWithScales(nn.Module):
    """NVFP4 codes of three experts with a global scale each."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(3, 6, 32) * torch.tensor([1.0, 0.01, 30.0]).view(3, 1, 1)
        self.register_buffer("scale", weight.abs().amax((1, 2), keepdim=True) / NVFP4.global_max)
        parts = [dynamic_quantize(w, g.reshape(()), format="nvfp4") for w, g in zip(weight, self.scale, strict=True)]
        self.weight = nn.Parameter(torch.stack([codes for codes, _ in parts]), requires_grad=False)
        self.blocks = nn.Parameter(torch.stack([blocks for _, blocks in parts]), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        scale = DEQUANTIZE(self.blocks, self.scale, format="fp8", dtype=torch.float32)
        weight = DEQUANTIZE(self.weight, scale, format="nvfp4", dtype=x.dtype)
        return torch.ops.qcompile.batched_linear(x, weight, self.bias)


def test_a_global_scale_for_each_expert_moves_behind_the_product() -> None:
    gm = graph_of(ExpertsWithScales(), torch.randn(3, 4, 32), dynamic_shapes=({1: DYNAMIC},))
    scale = next(node for node in calls(gm.graph, DEQUANTIZE) if node.kwargs["format"] == FP8.name)
    scale.meta["nn_module_stack"] = {"quantizer": ("quantizer", nn.Module)}
    rewrites(StoreWeightsTransposed, gm, torch.randn(3, 7, 32), rtol=1e-4, atol=1e-4)
    product = only_call(gm, aten.matmul.default)
    weight = product.args[1].args[0]  # type: ignore[union-attr]
    assert (module_path(weight.args[1]), module_path(weight)) == ("quantizer", "")  # type: ignore[union-attr,arg-type]
    assert shape(weight.args[1].args[1]) == ()  # type: ignore[union-attr,arg-type]
    (factor,) = product.users
    assert factor.target is aten.mul.Tensor and shape(factor.args[1]) == (3, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", [1, 3], ids=["same rows", "own rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_experts(experts: int, bias: bool) -> None:
    gm = folded(Experts(bias), torch.randn(experts, 4, 32), G, NVFP4)
    rewrites(StoreWeightsTransposed, gm, torch.randn(experts, 7, 32), **TOLERANCE)
    assert (count(gm, BATCHED_LINEAR), count(gm, aten.matmul.default)) == (0, 1)
    assert gm.get_parameter("weight").shape == (3, 6, 16)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("experts", [1, 3], ids=["same rows", "own rows"])
def test_experts_with_one_scale(fmt: Format, experts: int) -> None:
    gm = folded(Experts(), torch.randn(experts, 4, 32), torch.tensor(0.03), fmt)
    rewrites(StoreWeightsTransposed, gm, torch.randn(experts, 7, 32), **TOLERANCE)
    rewrites(FoldConstants, gm, torch.randn(experts, 7, 32), fired=2, **TOLERANCE)  # and the bias
    assert gm.get_parameter("weight").shape == (3, 32, 6)
    assert (count(gm, aten.transpose.int), count(gm, aten.mul.Tensor)) == (0, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_with_a_scale_per_channel_are_multiplied_behind_the_product(bias: bool) -> None:
    gm = folded(Experts(bias), torch.randn(3, 4, 32), torch.rand(3, 6, 1) * 0.05 + 0.01, FP8)
    rewrites(StoreWeightsTransposed, gm, torch.randn(3, 7, 32), rtol=1e-4, atol=1e-4)
    FoldConstants()(gm)
    assert only_call(gm, DEQUANTIZE).args[1].meta["val"].shape == ()  # type: ignore[union-attr]
    assert shape(only_call(gm, aten.mul.Tensor).args[1]) == (3, 1, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [256, 100])
@pytest.mark.parametrize("experts", [False, True])
def test_fp8_in_blocks_is_dequantized_with_scales_for_each_row(width: int, experts: bool) -> None:
    module = Experts() if experts else nn.Linear(width, 200)
    if isinstance(module, Experts):
        module.weight = nn.Parameter(torch.randn(3, 6, width))
    x = torch.randn(3, 4, width) if experts else torch.randn(4, width)
    gm = block_graph(module, x, activation=None)
    rewrites(StoreWeightsTransposed, gm, x, **TOLERANCE)
    weight = only_call(gm, DEQUANTIZE)
    rows = (3, 6) if experts else (200,)
    assert weight.kwargs["format"] == "fp8_1x128"
    assert shape(weight.args[1]) == (*rows, -(-width // 128))  # type: ignore[arg-type]
    assert gm.get_parameter("weight").dtype == torch.float8_e4m3fn


def test_a_packed_weight_that_two_layers_share_is_dequantized_once() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    gm = folded(Repeated(), torch.randn(2, 32), G, NVFP4)
    rewrites(StoreWeightsTransposed, gm, torch.randn(5, 32), fired=2, **TOLERANCE)
    assert (count(gm, aten.transpose.int), count(gm, DEQUANTIZE)) == (1, 2)


def test_experts_in_floats_are_products_too() -> None:
    x = torch.randn(3, 4, 32)
    gm = graph_of(Experts(), x)
    rewrites(StoreWeightsTransposed, gm, x, fired=count(gm, BATCHED_LINEAR), rtol=1e-5, atol=1e-5)
    assert count(gm, BATCHED_LINEAR) == 0


class Twice(nn.Module):
    """One weight with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


def test_int4_is_stored_in_columns_for_each_reader() -> None:
    gm = graph_of(Twice(), torch.randn(2, 64), dynamic_shapes=({0: DYNAMIC},))
    values = gm.get_parameter("inner.weight").detach().clone()
    codes, scale = dynamic_quantize(values, None, format="int4_32")
    chosen = Quantizer(INT4_GROUPS[32], None, block_scales=scale)
    InsertQdq({site: chosen for site in find_sites(gm) if site.operand == "weight"})(gm)
    FoldWeights()(gm)
    rewrites(StoreWeightsTransposed, gm, torch.randn(5, 64), fired=2, **TOLERANCE)
    FoldConstants()(gm)
    products = calls(gm.graph, aten.matmul.default)
    columns = INT4_COLUMNS[32]
    read = [product.args[1] for product in products]
    assert [node.kwargs["format"] for node in read] == [columns.name] * 2  # type: ignore[union-attr]
    stored = {str(node.args[0].target) for node in read}  # type: ignore[union-attr]
    assert len(stored) == 2 and "inner.weight" in stored
    for name in stored:
        assert torch.equal(gm.get_parameter(name), INT4_GROUPS[32].decode(codes).to(torch.int8).T)
