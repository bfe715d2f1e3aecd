"""Products of FP8 blocks along K, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import FileCheck

from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8
from passes.graph import aten, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.legalize.k_split import K_SPLIT, SplitK
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.blocks import INPUT, WEIGHT, block_graph, error, in_blocks, oracle

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
HALF = torch.float16


class Experts(nn.Module):
    def __init__(self, experts: int = 3, rows: int = 200, width: int = 256, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, rows, width) / 16)
        self.bias = nn.Parameter(torch.randn(experts, rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qcompile.batched_linear(x, self.weight, self.bias)


class Shared(nn.Module):
    """Two layers and a sine read one tensor; the second runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 96), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(self.b(x)), x.sin()


@pytest.mark.everyday(3)
@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("width", [256, 192, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_for_each_block(lead: tuple[int, ...], width: int, bias: bool) -> None:
    dynamic = tuple({axis: DYNAMIC for axis in range(len(lead))} for _ in "x")
    gm = block_graph(nn.Linear(width, 200, bias=bias), torch.randn(*lead, width), dynamic_shapes=dynamic)
    other = torch.randn(*(size + 1 for size in lead), width)
    rewrites(SplitK, gm, other, **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, DYNAMIC_QUANTIZE)) == (0, 0)
    assert (count(gm, aten.matmul.default), count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1, 2)
    assert (count(gm, aten.add.Tensor), count(gm, aten.constant_pad_nd.default)) == (bias, width % 128 != 0)
    # of the input and the weight; rows become a matrix, with their scales, and the result gets its axes back
    assert count(gm, aten.reshape.default) == (2 if len(lead) == 1 else 5)
    product = only_call(gm, aten.matmul.default)
    blocks = -(-width // 128)
    assert shape(product)[0] == blocks and shape(product)[2] == 200 and product.meta[K_SPLIT]
    FoldConstants()(gm)
    codes = only_call(gm, aten.matmul.default).args[1].args[0]  # type: ignore[union-attr]
    assert codes.op == "get_attr" and shape(codes) == (blocks, 128, 200)  # type: ignore[union-attr, arg-type]
    assert count(gm, aten.permute.default, aten.cat.default) == 0


def test_the_form_that_fuses() -> None:
    gm = block_graph(nn.Linear(256, 128).half(), torch.randn(2, 5, 256, dtype=HALF))
    SplitK()(gm)
    expected = ["reshape", "_to_copy", "abs", "amax", "maximum", "div", "div", "quantize", "dequantize", "transpose"]
    expected += ["matmul", "_to_copy", "mul", "sum", "reshape", "add", "_to_copy"]
    check = FileCheck()
    for name in expected:
        check = check.check(name)
    check.run(gm.code)


# a norm, an activation function with a few large values, K and N that are no multiples of 128, and many blocks
@pytest.mark.everyday(3)
@pytest.mark.parametrize(("rows", "width", "columns"), [(64, 256, 256), (7, 192, 200), (33, 100, 70), (16, 2048, 384)])
@pytest.mark.parametrize("outliers", [False, True])
def test_half_precision_against_the_oracle(rows: int, width: int, columns: int, outliers: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(width, columns).half()
    x = torch.randn(rows, width)
    if outliers:
        x[:, ::37] *= 300
    x = x.half()
    gm = block_graph(module, x)
    SplitK()(gm)
    (got,) = run(gm, x)
    assert error(got, oracle(x, module.weight, module.bias)) <= 5e-4  # the bar is 2e-3


def test_zeros_tiny_and_huge_numbers_in_half_precision() -> None:
    torch.manual_seed(0)
    module = nn.Linear(384, 160, bias=False).half()
    with torch.no_grad():
        module.weight[:128, :128] = 0
        module.weight[128:] *= 1e-3
    x = torch.randn(6, 384).half()
    x[0] = 0
    x[1] *= 1e-6  # subnormal
    x[2, :128] = 0
    x[3, 5] = 6e4
    x[4, 130:] = 6e-8
    x[5] = torch.linspace(-6e4, 6e4, 384).half()
    gm = block_graph(module, x)
    SplitK()(gm)
    (got,) = run(gm, x)
    want = oracle(x, module.weight)
    assert got.isfinite().all() and bool((got[0] == 0).all())
    for row in (2, 3, 4, 5):
        assert error(got[row], want[row]) <= 1e-3
    assert abs(got[1].double().numpy() - want[1]).max() <= 6e-8  # results are subnormal, too


def test_layers_with_one_input_share_its_quantizer() -> None:
    gm = block_graph(Shared(), torch.randn(4, 256))
    rewrites(SplitK, gm, torch.randn(4, 256), fired=3, **TOLERANCE)
    assert (count(gm, QUANTIZE), count(gm, aten.matmul.default)) == (2, 3)
    FoldConstants()(gm)
    codes = [n for n in gm.graph.find_nodes(op="get_attr") if n.meta["val"].dtype == torch.float8_e4m3fn]
    assert len(codes) == 2, "the weight of the layer that runs twice is stored once"


def test_another_reader_keeps_the_blocks() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 64), nn.Linear(256, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(4, 256)
    gm = graph_of(Other(), x)
    a_only = {"a.weight": WEIGHT, "a.input": INPUT, "b.input": INPUT}
    sites = {site: a_only.get(f"{site.module}.{site.operand}") for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in sites.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    rewrites(SplitK, gm, torch.randn(4, 256), **TOLERANCE)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, aten.linear.default), count(gm, aten.matmul.default)) == (1, 1, 1)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("joint", [False, True], ids=["own rows", "same rows"])
@pytest.mark.parametrize("width", [256, 192])
@pytest.mark.parametrize("bias", [False, True])
def test_experts(joint: bool, width: int, bias: bool) -> None:
    module = Experts(width=width, bias=bias)
    x = torch.randn(1 if joint else 3, 4, width)
    gm = block_graph(module, x, dynamic_shapes=({1: DYNAMIC},))
    other = torch.randn(1 if joint else 3, 7, width)
    rewrites(SplitK, gm, other, rtol=1e-4, atol=1e-4)
    assert count(gm, BATCHED_LINEAR) == 0
    assert shape(only_call(gm, aten.matmul.default))[0] == (2 if joint else 6)
    (got,) = run(gm, other)
    want = in_blocks(other.numpy(), 1) @ in_blocks(module.weight.detach().numpy(), 128).swapaxes(-1, -2)
    want = want if module.bias is None else want + module.bias.detach().double().numpy()[:, None]
    assert error(got, want) <= 1e-6


@pytest.mark.parametrize(("weight", "activation"), [(None, INPUT), (WEIGHT, None), (None, None)])
def test_other_layers_stay(weight: Quantizer | None, activation: Quantizer | None) -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), weight=weight, activation=activation)
    assert declines(SplitK, gm) == []


def test_a_weight_with_one_scale_stays() -> None:
    per_tensor = Quantizer(FP8, torch.tensor(0.01))
    assert declines(SplitK, block_graph(nn.Linear(256, 64), torch.randn(4, 256), weight=per_tensor)) == []


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_shape(rows: int, width: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = nn.Linear(width, columns), torch.randn(rows, width)
    gm = block_graph(module, x)
    SplitK()(gm)
    (got,) = run(gm, x)
    assert error(got, oracle(x, module.weight, module.bias)) <= 1e-5


def test_bfloat16() -> None:
    module, x = nn.Linear(200, 64).bfloat16(), torch.randn(8, 200).bfloat16()
    gm = block_graph(module, x)
    SplitK()(gm)
    (got,) = run(gm, x)
    assert got.dtype == torch.bfloat16
    assert error(got, oracle(x, module.weight, module.bias)) <= 2e-3


def test_an_empty_batch() -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(3, 256), dynamic_shapes=({0: DYNAMIC},))
    SplitK()(gm)
    (got,) = run(gm, torch.randn(0, 256))
    assert got.shape == (0, 64)
