"""Products with a dequantized weight, on a CPU in floating point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, NVFP4
from passes.graph import aten
from passes.ir import DEQUANTIZE
from passes.lower.cpu.onednn import ONEDNN_LINEAR
from passes.lower.cpu.onednn_linears import OneDnnLinears
from passes.lower.kernels import kernels
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run

S = torch.tensor(0.01)
NVFP4_GLOBAL = torch.tensor(0.0005)
# Weight and input of each kind of recipe.
FORMS = {
    "fp8": (Quantizer(FP8, S), Quantizer(FP8, S)),
    "fp8 per channel and token": (Quantizer(FP8, torch.full((8, 1), 0.01)), Quantizer(FP8_PER_TOKEN, None)),
    "fp8 in blocks": (Quantizer(FP8_128X128, None), Quantizer(FP8_1X128, None)),
    "fp8 weight": (Quantizer(FP8, S), None),
    "int8 weight": (Quantizer(INT8, S), None),
    "nvfp4": (Quantizer(NVFP4, NVFP4_GLOBAL), Quantizer(NVFP4, NVFP4_GLOBAL)),
    "nvfp4 weight": (Quantizer(NVFP4, NVFP4_GLOBAL), None),
}


def quantized(module: nn.Module, *inputs: Any, form: str = "fp8", **options: Any) -> GraphModule:
    weight, activation = FORMS[form]
    wanted = {"weight": weight, "input": activation}
    gm = graph_of(module, *inputs, **options)
    chosen = {site: wanted.get(site.operand) for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in chosen.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    return gm


@pytest.mark.everyday(10)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(2, 3), (5,), (), (2, 2, 3)], ids=str)
def test_every_format_in_float32(form: str, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 32)
    gm = quantized(nn.Linear(32, 8), x, form=form)
    rewrites(OneDnnLinears, gm, x, rtol=1e-5, atol=1e-5)
    assert count(gm, ONEDNN_LINEAR) == 1
    assert count(gm, aten.linear.default) == 0
    (kernel,) = kernels(gm)
    assert kernel.kernel == "oneDNN linear, weight dequantized before it"


def test_float16_is_summed_in_float32() -> None:
    x = torch.randn(6, 256).half()
    layer = nn.Linear(256, 8).half()
    gm = quantized(layer, x)
    linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    operands = [run(_returning(gm, operand), x)[0].double() for operand in linear.args]
    exact = torch.nn.functional.linear(*operands)
    OneDnnLinears()(gm)
    (result,) = run(gm, x)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.double(), exact, rtol=2.0**-11, atol=1e-6)  # rounded once


def _returning(gm: GraphModule, node: Any) -> GraphModule:
    """`gm` as far as `node`."""
    result = copy.deepcopy(gm)
    (same,) = (n for n in result.graph.nodes if n.name == node.name)
    result.graph.output_node().args = ((same,),)
    result.recompile()
    return result


def test_bfloat16_stays_and_is_noted() -> None:
    x = torch.randn(6, 32).bfloat16()
    gm = quantized(nn.Linear(32, 8).bfloat16(), x)
    assert declines(OneDnnLinears, gm) == []
    assert [kernel.kernel for kernel in kernels(gm)] == ["linear, weight dequantized before it"]


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    gm = quantized(nn.Linear(32, 8), torch.randn(6, 32))
    assert declines(OneDnnLinears, gm) == ["this build of torch has no oneDNN"]
    assert declines(OneDnnLinears, gm) == []  # it is noted


def test_a_float_layer_stays() -> None:
    assert declines(OneDnnLinears, graph_of(nn.Linear(32, 8), torch.randn(6, 32))) == []


def test_experts_stay_and_are_noted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight)

    gm = quantized(Experts(), torch.randn(3, 4, 32), form="fp8 weight")
    assert declines(OneDnnLinears, gm) == []
    assert [kernel.kernel for kernel in kernels(gm)] == ["bmm, weights dequantized before it"]


def test_another_reader_of_the_weight_keeps_it() -> None:
    """A tied embedding, or a layer that is called twice."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(4, 32)
    gm = quantized(Tied(), x)
    weights = {node.args[1] for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)}
    rewrites(OneDnnLinears, gm, x, fired=2, rtol=1e-5, atol=1e-5)
    assert count(gm, DEQUANTIZE) == 2 + len(weights)


@pytest.mark.everyday(7)
@pytest.mark.parametrize("axes", [{0: DYNAMIC}, {1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dynamic_batch_and_length(form: str, axes: dict[int, Any]) -> None:
    gm = quantized(nn.Linear(32, 8), torch.randn(2, 3, 32), form=form, dynamic_shapes=(axes,))
    x = torch.randn(5 if 0 in axes else 2, 7 if 1 in axes else 3, 32)
    rewrites(OneDnnLinears, gm, x, rtol=1e-5, atol=1e-5)


@given(
    m=st.integers(0, 9),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    magnitude=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    bias=st.booleans(),
)
def test_every_size_and_magnitude(m: int, k: int, n: int, magnitude: float, bias: bool) -> None:
    x = torch.randn(m, k) * magnitude
    gm = quantized(nn.Linear(k, n, bias=bias), x, form="fp8 weight")
    rewrites(OneDnnLinears, gm, x, rtol=1e-5, atol=1e-5 * magnitude)


def test_a_nan_and_an_infinity_come_through() -> None:
    x = torch.tensor([[float("nan")] + [0.0] * 31, [float("inf")] * 32, [1.0] * 32])
    gm = quantized(nn.Linear(32, 8), x, form="fp8 weight")
    rewrites(OneDnnLinears, gm, x, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    torch.library.opcheck(ONEDNN_LINEAR, (torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)))
    torch.library.opcheck(ONEDNN_LINEAR, (torch.randn(3, 8), torch.randn(8, 4).t(), None))
