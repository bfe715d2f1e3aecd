"""Scales that are measured at run time, for each token or for the tensor, with a constant one inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.canonicalize.share import ShareQuantizers
from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_PER_TOKEN, INT8, NVFP4, Format
from passes.graph import aten, calls
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dynamic_quantize
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.measured_scales import MeasuredToConstant
from passes.normalize.convolution import NormalizeConvolution
from passes.normalize.noops import RemoveNoOps
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, graph_of, rewrites, run
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme
from tests.passes.legalize.test_k_split import Experts


class Readers(nn.Module):
    """Two layers and sin read one tensor."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4, bias=bias), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(x), x.sin()


def per_token(module: nn.Module, *inputs: Tensor, operand: str = "input", **options: object) -> GraphModule:
    gm = graph_of(module, *inputs, **options)
    InsertQdq({s: Quantizer(FP8_PER_TOKEN, None) for s in find_sites(gm) if s.operand == operand})(gm)
    return gm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_linear_layers_share_the_division(bias: bool, half: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    module = Readers(bias=bias).to(dtype)
    gm = per_token(module, torch.randn(2, 8, dtype=dtype), dynamic_shapes=({0: DYNAMIC},))
    # x / amax is rounded before it is quantized: codes at a tie move by one step of 1/16
    rewrites(MeasuredToConstant, gm, torch.randn(5, 8, dtype=dtype), rtol=0.1, atol=0.1)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, QUANTIZE), count(gm, aten.div.Tensor)) == (0, 1, 1)
    FileCheck().check("aten.amax").check("aten.maximum").check("aten.div").check("quantize").check("linear").check(
        "mul"
    ).run(gm.code)


def test_a_layer_without_bias_that_the_float_user_does_not_see() -> None:
    x = torch.randn(2, 8)
    gm = per_token(Readers(), x)
    MeasuredToConstant()(gm)
    assert torch.equal(run(gm, x)[2], x.sin())


@pytest.mark.parametrize("bias", [False, True])
def test_experts_have_a_bias_each(bias: bool) -> None:
    x = torch.randn(3, 4, 256)
    gm = per_token(Experts(bias=bias), x)
    rewrites(MeasuredToConstant, gm, x, rtol=0.1, atol=0.1)
    assert count(gm, BATCHED_LINEAR) == count(gm, QUANTIZE) == 1


@pytest.mark.everyday(1)
@pytest.mark.parametrize("fmt", [FP8_PER_TOKEN, FP8, INT8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_readers_get_the_values(fmt: Format, dtype: torch.dtype) -> None:
    """An output quantizer gives the quantized tensor to whoever reads it: a layer, and what is none."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return nn.functional.avg_pool1d(y, 2), self.proj(y)

    x = torch.randn(3, 2, 8, dtype=dtype)
    gm = graph_of(Normed().to(dtype), x, dynamic_shapes=({0: DYNAMIC},))
    InsertQdq({s: Quantizer(fmt, None) for s in find_sites(gm) if s.name == "norm.output_quantizer"})(gm)
    rewrites(MeasuredToConstant, gm, x, rtol=0.1, atol=0.1)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, QUANTIZE), count(gm, aten.div.Tensor)) == (0, 1, 1)
    assert count(gm, aten.mul.Tensor) == 2


@pytest.fixture(scope="module")
def both() -> tuple[GraphModule, GraphModule]:
    def make() -> GraphModule:
        torch.manual_seed(0)
        return per_token(nn.Linear(8, 4), torch.randn(2, 8), dynamic_shapes=({0: DYNAMIC},))

    static = make()
    MeasuredToConstant()(static)
    return make(), static


tokens = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(8)), elements=st.floats(-(2.0**99), 2.0**99, width=32)
)


@given(x=tokens)
def test_tokens_of_every_size(both: tuple[GraphModule, GraphModule], x: np.ndarray) -> None:
    dynamic, static = both
    (want,), (got,) = run(dynamic, torch.from_numpy(x)), run(static, torch.from_numpy(x))
    assert got.isfinite().all()
    amax = np.abs(x).max(axis=-1, keepdims=True)
    # one step at the largest magnitude for each of eight products, and the floor under amax
    assert bool(((got - want).abs() <= torch.from_numpy(amax * 0.4 + 1e-4)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zeros_tiny_and_large_tokens_in_half_precision(dtype: torch.dtype) -> None:
    module = nn.Linear(4, 4).to(dtype)
    x = torch.tensor([[0.0] * 4, [1e-7, 0, 0, 1e-6], [6e4, -6e4, 1, 0], [1, 2, 3, 4]]).to(dtype)
    gm = per_token(module, x)
    MeasuredToConstant()(gm)
    (got,) = run(gm, x)
    assert torch.equal(got[0], module.bias.detach())
    assert got.isfinite().all()
    torch.testing.assert_close(got[[0, 1, 3]], module(x).detach()[[0, 1, 3]], rtol=0.1, atol=0.2)


class Layers(nn.Module):
    """Two layers with codes that read one tensor."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        two_levels = fmt.scale is not None
        for name in ("a", "b"):
            weight = torch.randn(24, 32)
            scale = weight.abs().amax() / fmt.global_max
            if two_levels:
                codes, blocks = dynamic_quantize(weight, scale, format=fmt.name)
                values = QuantizedWeight(Scheme(fmt, fmt, measured=True), codes, blocks, scale)
            else:
                values = QuantizedWeight(Scheme(fmt, fmt, measured=True), fmt.encode(weight / scale), scale)
            setattr(self, name, QuantizedLinear(values, torch.randn(24)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def shared(fmt: Format, x: Tensor) -> GraphModule:
    gm = graph_of(Layers(fmt), x, dynamic_shapes=({0: DYNAMIC},))
    RemoveNoOps()(gm)
    ShareQuantizers()(gm)
    return gm


@pytest.mark.parametrize("fmt", [FP8, INT8, NVFP4], ids=lambda fmt: fmt.name)
def test_the_amax_is_divided_out_and_multiplied_back(fmt: Format) -> None:
    x = torch.randn(4, 32)
    gm = shared(fmt, x)
    assert count(gm, DYNAMIC_QUANTIZE) == 1
    tolerance = 0.3 if fmt is NVFP4 else 0.05  # a code at a tie
    rewrites(MeasuredToConstant, gm, torch.randn(7, 32), rtol=0, atol=tolerance)
    assert count(gm, aten.amax.default) == count(gm, aten.div.Tensor) == 1
    assert (count(gm, QUANTIZE), count(gm, DYNAMIC_QUANTIZE)) == ((0, 1) if fmt is NVFP4 else (1, 0))


@pytest.mark.everyday(4)
@pytest.mark.parametrize("fmt", [FP8, INT8, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 200.0])
def test_tensors_of_every_size_in_half_precision(fmt: Format, size: float) -> None:
    x = torch.randn(4, 32) * size
    module = Layers(fmt)
    gm = graph_of(module, x)
    RemoveNoOps()(gm)
    ShareQuantizers()(gm)
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    FoldWeights()(gm)
    if fmt is NVFP4:
        (dynamic,) = calls(gm.graph, DYNAMIC_QUANTIZE)
        assert dynamic.args[1].meta["val"].dtype == torch.float32  # type: ignore[union-attr]
    (before, _), want = run(gm, x), module(x)[0]
    MeasuredToConstant()(gm)
    (after, _) = run(gm, x)
    assert before.isfinite().all()
    assert after.isfinite().all()
    limit = 0.02 * max(1.0, size) * 6 + 0.02
    assert float((after - want).abs().max()) < (limit * 4 if fmt is NVFP4 else limit)


class Measured(nn.Module):
    """A convolution, with or without a bias, of codes in `fmt` whose scale is measured."""

    def __init__(self, fmt: str, bias: bool) -> None:
        super().__init__()
        self.layer, self.fmt = nn.Conv2d(4, 6, 3, padding=1, bias=bias), fmt

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = DYNAMIC_QUANTIZE(x, None, format=self.fmt)
        return self.layer(DEQUANTIZE(codes, scale, format=self.fmt, dtype=x.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_with_one_scale_is_multiplied_behind(bias: bool) -> None:
    x = torch.randn(2, 4, 6, 6)
    gm = graph_of(Measured("fp8", bias), x)
    NormalizeConvolution()(gm)
    rewrites(MeasuredToConstant, gm, x, rtol=0.05, atol=0.05)
    FileCheck().check("quantize").check("convolution").check("mul").run(gm.code)
    assert [node.args[0].target for node in calls(gm.graph, aten.convolution.default)] == [DEQUANTIZE]  # type: ignore[union-attr]


def test_scales_of_tokens_are_multiplied_before_a_convolution() -> None:
    """It adds over them."""
    x = torch.randn(2, 4, 6, 6)
    gm = graph_of(Measured("fp8_per_token", True), x)
    NormalizeConvolution()(gm)
    rewrites(MeasuredToConstant, gm, x, rtol=0.05, atol=0.05)
    assert [node.args[0].target for node in calls(gm.graph, aten.convolution.default)] == [aten.mul.Tensor]  # type: ignore[union-attr]
