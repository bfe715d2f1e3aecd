"""Linear layers of INT8 codes as integer products on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import INT8, INT8_PER_TOKEN, Format
from passes.graph import aten
from passes.ir import DEQUANTIZE
from passes.lower import int_mm
from passes.lower.device import Device
from passes.lower.int_mm import LONGEST, LinearsToIntMm
from passes.lower.kernels import kernels
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import scale_of

to_int_mm = partial(LinearsToIntMm, Device("cpu"))


@pytest.fixture(autouse=True)
def cpu_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes does not depend on it, only how fast."""
    monkeypatch.setattr(int_mm, "multiplies_int8", lambda: True)


SCALE = torch.tensor(0.03)
STATIC = Quantizer(INT8, SCALE)


def quantized(
    module: nn.Module,
    *inputs: Any,
    activation: Quantizer | None = STATIC,
    per_channel: bool = True,
    fmt: Format = INT8,
    **options: Any,
) -> GraphModule:
    """`module` with INT8 weights as codes, and inputs as `activation` says."""
    gm = graph_of(module, *inputs, **options)
    chosen = {}
    for site in find_sites(gm):
        if site.operand == "weight":
            weight = module.get_parameter(f"{site.module}.weight".lstrip("."))
            chosen[site] = Quantizer(fmt, scale_of(weight.detach(), fmt, per_channel=per_channel))
        elif site.operand == "input" and activation is not None:
            chosen[site] = activation
    InsertQdq(chosen)(gm)
    FoldWeights()(gm)
    return gm


def decoded_in_float64(gm: GraphModule, x: Tensor) -> tuple[Tensor, float]:
    """The one layer of `gm` as a product of its decoded operands in float64, and its largest sum of magnitudes.

    Decoded operands are rounded to float32 each, which is all that is left of a sum that cancels.
    """
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    output = gm.graph.output_node()
    kept = output.args
    output.args = ((*linear.args[:2],),)
    decoded, weight = (operand.double() for operand in run(gm, x))
    output.args = kept
    bias = run(gm, x * 0)[0] * 0 if len(linear.args) < 3 else gm.get_parameter("bias").double()
    sums = decoded.abs() @ weight.abs().T + bias.abs()
    return (decoded @ weight.T + bias).detach(), float(sums.detach().max())


FORMS = {
    "static": STATIC,
    "per tensor": Quantizer(INT8, None),
    "per token": Quantizer(INT8_PER_TOKEN, None),
}


@pytest.mark.everyday(8)
@pytest.mark.parametrize("activation", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("lead", [(2, 3), (5,), (), (2, 2, 3)], ids=str)
def test_codes_are_multiplied_as_integers(lead: tuple[int, ...], per_channel: bool, activation: Quantizer) -> None:
    x = torch.randn(*lead, 24)
    gm = quantized(nn.Linear(24, 7), x, activation=activation, per_channel=per_channel)
    rewrites(to_int_mm, gm, x, rtol=1e-5, atol=1e-5)
    assert count(gm, aten._int_mm.default) == 1
    assert count(gm, aten.linear.default, DEQUANTIZE) == 0
    (kernel,) = kernels(gm)
    assert "int_mm" in kernel.kernel


@pytest.mark.slow
@given(
    m=st.integers(1, 9),
    k=st.integers(2, 70),
    n=st.integers(1, 40),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    form=st.sampled_from(sorted(FORMS)),
    bias=st.booleans(),
)
def test_every_size_against_float64(m: int, k: int, n: int, magnitude: float, form: str, bias: bool) -> None:
    torch.manual_seed(m + 10 * k + 1000 * n)  # of the example alone
    layer = nn.Linear(k, n, bias=bias)
    x = torch.randn(m, k) * magnitude
    gm = quantized(layer, x, activation=FORMS[form])
    expected, sums = decoded_in_float64(gm, x)
    assert to_int_mm()(gm).modified
    torch.testing.assert_close(run(gm, x)[0].double(), expected, rtol=1e-6, atol=1e-6 * sums)


def test_sums_beyond_float32_are_exact() -> None:
    """127 * 127 * K is 16 bits more than a float holds, and cancels down to one product."""
    layer = nn.Linear(4097, 1, bias=False)
    x = torch.full((1, 4097), 127.0)
    with torch.no_grad():
        layer.weight.fill_(127.0)
        layer.weight[0, 2049:] = -127.0
    gm = quantized(layer, x, activation=Quantizer(INT8, torch.tensor(1.0)), per_channel=False)
    to_int_mm()(gm)
    assert run(gm, x)[0].item() == 127.0 * 127.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_within_two_units_of_the_accumulation(form: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 16).to(dtype)
    x = torch.randn(8, 64).to(dtype)
    gm = quantized(layer, x, activation=FORMS[form])
    (before,) = run(gm, x)
    accumulated = decoded_in_float64(gm, x)[0].abs().max().item()
    to_int_mm()(gm)
    (after,) = run(gm, x)
    assert after.dtype == dtype
    unit = accumulated * torch.finfo(dtype).eps
    torch.testing.assert_close(after.float(), before.float(), rtol=0.0, atol=2 * unit)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("axes", [{0: DYNAMIC}, {1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dynamic_batch_and_length(form: str, axes: dict[int, Any]) -> None:
    gm = quantized(nn.Linear(24, 7), torch.randn(2, 3, 24), activation=FORMS[form], dynamic_shapes=(axes,))
    x = torch.randn(5 if 0 in axes else 2, 7 if 1 in axes else 3, 24)
    rewrites(to_int_mm, gm, x, rtol=1e-5, atol=1e-5)


def test_two_layers_read_one_tensor_that_a_third_reader_sees_dequantized() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 4), nn.Linear(24, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x.sin()
            return self.a(x), self.b(x), x

    x = torch.randn(2, 3, 24)
    gm = graph_of(Fork(), x)
    sites = [site for site in find_sites(gm) if site.operand in ("input", "weight")]
    InsertQdq(dict.fromkeys(sites, STATIC))(gm)
    FoldWeights()(gm)
    (pair,) = {site.consumer.args[0] for site in sites}
    output = gm.graph.output_node()
    output.args = ((*output.args[0][:2], pair),)  # type: ignore[index]
    rewrites(to_int_mm, gm, x, fired=2, rtol=1e-5, atol=1e-5)
    assert count(gm, DEQUANTIZE) == 1


def test_layers_that_share_a_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(3, 8)
    rewrites(to_int_mm, quantized(Twice(), x), x, fired=2, rtol=1e-5, atol=1e-5)


def test_a_float_input_or_weight_stays() -> None:
    x = torch.randn(3, 8)
    assert declines(to_int_mm, quantized(nn.Linear(8, 8), x, activation=None)) == []
    assert declines(to_int_mm, graph_of(nn.Linear(8, 8), x)) == []


def test_sums_that_could_overflow_are_declined() -> None:
    x = torch.randn(1, LONGEST + 1)
    reasons = declines(to_int_mm, quantized(nn.Linear(LONGEST + 1, 1), x))
    assert reasons == [f"K = {LONGEST + 1}: sums of more than {LONGEST} products of INT8 codes can overflow int32"]


def test_one_column_is_declined() -> None:
    reasons = declines(to_int_mm, quantized(nn.Linear(1, 8), torch.randn(3, 1)))
    assert reasons == ["K = 1, of which torch._int_mm makes wrong numbers on a CPU"]


def test_scales_along_k_are_declined() -> None:
    x = torch.randn(3, 8)
    gm = quantized(nn.Linear(8, 8), x, activation=Quantizer(INT8, torch.full((8,), 0.03)))
    assert declines(to_int_mm, gm) == ["the input has neither one scale nor one for each row"]


def test_without_vnni_it_is_left_to_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_mm, "multiplies_int8", lambda: False)
    (reason,) = declines(to_int_mm, quantized(nn.Linear(8, 8), torch.randn(3, 8)))
    assert reason == "this CPU has no VNNI, without which torch multiplies integers one by one"
