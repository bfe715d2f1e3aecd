"""Quantized convolutions on a CPU, against a convolution in float64 of what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.compat import has_onednn
from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8, Format
from passes.graph import aten
from passes.ir import DEQUANTIZE
from passes.lower.cpu import convolutions
from passes.lower.cpu.convolutions import ConvolutionsToOneDnn
from passes.lower.cpu.onednn import ONEDNN_CONVOLUTION
from passes.lower.kernels import kernels
from passes.normalize.convolution import NormalizeConvolution
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda **o: nn.Conv2d(8, 6, 3, padding=1, **o), (8, 7, 9)),
    "strided, dilated": (lambda **o: nn.Conv2d(8, 6, (3, 2), 2, (2, 1), 2, **o), (8, 9, 8)),
    "depthwise": (lambda **o: nn.Conv2d(8, 8, 3, groups=8, **o), (8, 6, 6)),
    "grouped": (lambda **o: nn.Conv2d(8, 12, 3, padding=1, groups=2, **o), (8, 6, 6)),
    "1-D": (lambda **o: nn.Conv1d(8, 6, 5, 2, 2, **o), (8, 20)),
    "3-D": (lambda **o: nn.Conv3d(8, 6, 3, padding=1, **o), (8, 4, 5, 6)),
}


@pytest.fixture(autouse=True)
def cpu_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without it can round small sums alike, and these are small."""
    if not has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(convolutions, "cpu_has_vnni", lambda: True)


def quantized(
    layer: Any, x: Tensor, fmt: Format = INT8, *, given: Format | None = INT8, measured: bool = False, **options: Any
) -> GraphModule:
    """`layer` with a scale for each channel of its weight, and one, a constant or not, for its input."""
    gm = graph_of(layer, x, **options)
    NormalizeConvolution()(gm)
    axes = tuple(range(1, layer.weight.ndim))
    scale = layer.weight.detach().float().abs().amax(axes, keepdim=True) / fmt.max
    wanted: dict[str, Quantizer | None] = {"weight": Quantizer(fmt, scale)}
    if given is not None:
        wanted["input"] = Quantizer(given, None if measured else torch.tensor(3.0 / given.max))
    chosen = {site: wanted.get(site.operand) for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in chosen.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    return gm


def in_float64(gm: GraphModule, x: Tensor) -> Tensor:
    """The convolution of `gm` of what its operands are dequantized to."""
    node = only_call(gm, aten.convolution.default)
    output, kept = gm.graph.output_node(), gm.graph.output_node().args
    output.args = ((*node.args[:2], *([node.args[2]] if node.args[2] is not None else [])),)
    operands = [value.double() for value in run(gm, x)]
    output.args = kept
    bias = operands[2] if len(operands) > 2 else None
    return torch.convolution(*operands[:2], bias, *node.args[3:])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("measured", [False, True])
def test_codes_are_convolved_as_integers(kind: str, bias: bool, measured: bool) -> None:
    torch.manual_seed(0)
    make, sizes = KINDS[kind]
    x = torch.randn(2, *sizes)
    gm = quantized(make(bias=bias), x, measured=measured)
    expected = in_float64(gm, x)
    rewrites(ConvolutionsToOneDnn, gm, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(gm, x)[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert count(gm, ONEDNN_CONVOLUTION) == 1 and count(gm, aten.convolution.default, DEQUANTIZE) == 0
    assert [(k.layer, k.kernel) for k in kernels(gm)] == [("", "oneDNN convolution of codes")]
    assert gm.state_dict()["weight"].dtype == torch.int8


def test_sizes_that_are_known_at_run_time_and_an_empty_batch() -> None:
    layer, x = nn.Conv2d(4, 6, 3, 2, 1), torch.randn(2, 4, 9, 9)
    gm = quantized(layer, x, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},))
    rewrites(ConvolutionsToOneDnn, gm, x, rtol=1e-5, atol=1e-5)
    for sizes in ((5, 4, 9, 9), (1, 4, 12, 7), (0, 4, 9, 9)):
        given = torch.randn(*sizes)
        assert run(gm, given)[0].shape == layer(given).shape


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_alone(to: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6).to(to)
    gm = quantized(nn.Conv2d(8, 6, 3).to(to), x)
    node = only_call(gm, aten.convolution.default)
    codes, scales = zip(*((run_of(gm, o.args[0], x), run_of(gm, o.args[1], x)) for o in node.args[:2]), strict=True)  # type: ignore[union-attr]
    bias = run_of(gm, node.args[2], x)
    ConvolutionsToOneDnn()(gm)
    exact = torch.conv2d(codes[0].double() * scales[0].double(), codes[1].double() * scales[1].double(), bias.double())
    assert float((run(gm, x)[0].double() - exact).abs().max()) <= float(exact.abs().max()) * torch.finfo(to).eps


def run_of(gm: GraphModule, node: Any, x: Tensor) -> Tensor:
    output, kept = gm.graph.output_node(), gm.graph.output_node().args
    output.args = ((node,),)
    (value,) = run(gm, x)
    output.args = kept
    return value


@pytest.mark.parametrize(
    ("fmt", "given", "reason"),
    [(FP8, FP8, "no fp8 codes"), (INT8, FP8, "no fp8 codes"), (FP8, None, ""), (INT8, None, "")],
)
def test_others_are_dequantized_and_say_why(fmt: Format, given: Format | None, reason: str) -> None:
    x = torch.randn(1, 4, 6, 6)
    gm = quantized(nn.Conv2d(4, 6, 3), x, fmt, given=given)
    told = declines(ConvolutionsToOneDnn, gm)
    assert [reason in sentence for sentence in told] == ([True] if reason else [])
    assert [kernel.kernel for kernel in kernels(gm)] == ["convolution, weight dequantized before it"]
    assert gm.state_dict()["weight"].itemsize == 1


def test_a_cpu_without_vnni_and_sums_that_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 6, 6)
    monkeypatch.setattr(convolutions, "_LONGEST", 35)
    assert declines(ConvolutionsToOneDnn, quantized(nn.Conv2d(4, 6, 3), x), reason="36 products .* overflow")
    monkeypatch.setattr(convolutions, "cpu_has_vnni", lambda: False)
    assert declines(ConvolutionsToOneDnn, quantized(nn.Conv2d(4, 6, 3), x), reason="no VNNI")


def test_the_largest_codes_are_exact() -> None:
    """128 * 128 for each product: of 8-bit sums in 16 bits two would saturate."""
    layer, x = nn.Conv2d(64, 2, 3, bias=False), torch.full((1, 64, 3, 3), -3.1)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    gm = quantized(layer, x)
    expected = in_float64(gm, x)
    assert ConvolutionsToOneDnn()(gm).modified
    torch.testing.assert_close(run(gm, x)[0].double(), expected, rtol=1e-6, atol=0)
