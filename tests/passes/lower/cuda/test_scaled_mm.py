"""FP8 linear layers as scaled products: torch runs them on a CPU, slowly, and numpy is the judge."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.formats import FP8, FP8_PER_TOKEN
from passes.graph import aten, dtype, module_path
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.cuda.scaled_mm import LinearsToScaledMm
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, only_call, rewrites, run
from tests.passes.blocks import error
from tests.passes.lower.cuda.support import ADA, AMPERE, BLACKWELL, HOPPER, emulated, fp8, quantized, trace
from tests.passes.support import Mlp, scale_of

__all__ = ["emulated"]

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
STATIC, MEASURED, TOKENS = Quantizer(FP8, torch.tensor(0.01)), Quantizer(FP8, None), Quantizer(FP8_PER_TOKEN, None)
ONE = Quantizer(FP8, torch.tensor(0.001))
ROUNDING = {BF16: 4e-3, HALF: 5e-4, FLOAT: 1e-6}


def lower(device: Device = HOPPER, **options: bool) -> Any:
    return lambda: LinearsToScaledMm(device, **options)


def per_channel(module: nn.Linear) -> Quantizer:
    return Quantizer(FP8, scale_of(module.weight.detach(), per_channel=True))


def oracle(x: Tensor, module: nn.Linear, weight: Quantizer, input: Quantizer) -> Any:
    """The layer in float64, from what FP8 makes of its operands."""
    scale = input.scale
    if scale is None:
        amax = x.abs().amax(-1, keepdim=True) if input is TOKENS else x.abs().amax()
        scale = amax.float() / 448
    assert weight.scale is not None
    result = fp8(x, scale) @ fp8(module.weight, weight.scale).T
    return result if module.bias is None else result + module.bias.detach().double().numpy()


@pytest.mark.everyday(6)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("to", [BF16, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("device", [ADA, HOPPER, BLACKWELL], ids=lambda d: str(d.capability))
@pytest.mark.parametrize("input", [STATIC, MEASURED, TOKENS], ids=["static", "measured", "tokens"])
@pytest.mark.parametrize("channels", [False, True], ids=["one", "rows"])
def test_every_form(to: torch.dtype, device: Device, input: Quantizer, channels: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(64, 48).to(to), torch.randn(2, 5, 64).to(to)
    weight = per_channel(module) if channels else ONE
    gm = quantized(module, x, weight=weight, input=input, dynamic_shapes=({0: DYNAMIC},))
    other = torch.randn(3, 5, 64).to(to)
    tolerance = {FLOAT: {"rtol": 1e-5, "atol": 1e-5}}.get(to, {"rtol": 2e-2, "atol": 2e-2})
    rewrites(lower(device), gm, other, **tolerance)
    assert (count(gm, aten._scaled_mm.default), count(gm, aten.linear.default), count(gm, DEQUANTIZE)) == (1, 0, 0)
    assert count(gm, QUANTIZE, DYNAMIC_QUANTIZE) == 1
    (got,) = run(gm, other)
    assert got.dtype == to and got.shape == (3, 5, 48)
    assert error(got, oracle(other, module, weight, input)) <= ROUNDING[to]
    (fake,) = trace(gm, other)
    assert fake.device.type == "cuda" and fake.dtype == to and fake.shape == (3, 5, 48)
    in_rows = channels or input is TOKENS
    after = in_rows and (to == FLOAT or (to == HALF and device is ADA)) and device is not HOPPER
    (kernel,) = kernels(gm)
    form = "scales of rows after it" if after else "scales of rows" if in_rows else "one scale"
    assert kernel.kernel == f"scaled_mm, {form}" and kernel.dropped == ""
    product = only_call(gm, aten._scaled_mm.default)
    assert (product.args[4] is not None) == (to != FLOAT and not after), "the bias goes in where it can"
    assert product.args[6] == (FLOAT if after else to) and product.args[7] is True


ON_CPU = [(STATIC, False), (MEASURED, False), (TOKENS, True), (STATIC, True), (TOKENS, False)]


@pytest.mark.parametrize(("input", "channels"), ON_CPU)
@pytest.mark.parametrize("to", [BF16, FLOAT], ids=str)
def test_torch_runs_it(input: Quantizer, channels: bool, to: torch.dtype) -> None:
    if (channels or input is TOKENS) and torch.__version__ < "2.13":
        pytest.skip("scales of rows came to CPUs later")
    module, x = nn.Linear(64, 48).to(to), torch.randn(7, 64).to(to)
    weight = per_channel(module) if channels else ONE
    gm = quantized(module, x, weight=weight, input=input)
    LinearsToScaledMm(HOPPER)(gm)
    (got,) = run(gm, x)
    assert error(got, oracle(x, module, weight, input)) <= ROUNDING[to]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 2)], ids=str)
@pytest.mark.usefixtures("emulated")
def test_any_rank(lead: tuple[int, ...]) -> None:
    module, x = nn.Linear(32, 16, bias=False), torch.randn(*lead, 32)
    gm = quantized(module, x, weight=ONE, input=MEASURED)
    rewrites(lower(), gm, x, rtol=1e-5, atol=1e-5)
    assert run(gm, x)[0].shape == (*lead, 16)


def test_a_model_of_two_layers() -> None:
    x = torch.randn(3, 32)
    gm = quantized(Mlp(32, 64), x, weight=ONE, input=STATIC, dynamic_shapes=({0: DYNAMIC},))
    log = rewrites(lower(), gm, torch.randn(4, 32), fired=2, rtol=1e-5, atol=1e-5)
    assert log.declined == []
    assert [(kernel.layer, kernel.kernel) for kernel in kernels(gm)] == [
        ("up", "scaled_mm, one scale"),
        ("down", "scaled_mm, one scale"),
    ]
    products = [node for node in gm.graph.nodes if node.target is aten._scaled_mm.default]
    assert [module_path(node) for node in products] == ["up", "down"]


def test_another_user_keeps_the_dequantized_values() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 20)  # 20 is no multiple of 16

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(3, 32)
    gm = quantized(Two(), x, weight=ONE, input=STATIC)
    log = rewrites(lower(), gm, x, rtol=1e-5, atol=1e-5)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE), count(gm, aten.linear.default)) == (1, 2, 1)
    (decline,) = log.declined
    assert decline.module == "b" and decline.reason == "N = 20 is no multiple of 16"


class Tied(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.usefixtures("emulated")
def test_a_layer_that_runs_twice() -> None:
    x, module = torch.randn(3, 32), Tied()
    gm = quantized(module, x, weight=per_channel(module.layer), input=TOKENS)
    rewrites(lower(), gm, x, fired=2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "sizes", "weight", "reason"),
    [
        (AMPERE, (32, 32), ONE, "compute capability 8.0 has no FP8 matrix units"),
        (Device("cpu"), (32, 32), ONE, "a cpu device has no FP8 matrix units"),
        (HOPPER, (24, 32), ONE, "K = 24 is no multiple of 16"),
        (HOPPER, (32, 24), ONE, "N = 24 is no multiple of 16"),
        (HOPPER, (32, 32), Quantizer(FP8, torch.full((1, 32), 0.01)), "the weight has scales along the reduction axis"),
    ],
)
def test_declines(device: Device, sizes: tuple[int, int], weight: Quantizer, reason: str) -> None:
    gm = quantized(nn.Linear(*sizes), torch.randn(3, sizes[0]), weight=weight, input=STATIC)
    assert declines(lower(device), gm) == [reason]


def test_declines_scales_of_columns_of_the_input() -> None:
    columns = Quantizer(FP8, torch.full((32,), 0.01))
    gm = quantized(nn.Linear(32, 32), torch.randn(3, 32), weight=ONE, input=columns)
    assert declines(lower(), gm) == ["the input has neither one scale nor one for each row"]


@pytest.mark.parametrize(("weight", "input"), [(None, STATIC), (ONE, None), (None, None)])
def test_layers_that_are_not_quantized_as_a_whole_stay(weight: Quantizer | None, input: Quantizer | None) -> None:
    gm = quantized(nn.Linear(32, 32), torch.randn(3, 32), weight=weight, input=input)
    assert declines(lower(), gm) == []


def test_scales_in_half_precision_become_float32() -> None:
    scale = Quantizer(FP8, torch.tensor(0.01, dtype=HALF))
    x = torch.randn(3, 32, dtype=HALF)
    gm = quantized(nn.Linear(32, 16).half(), x, weight=scale, input=scale)
    LinearsToScaledMm(HOPPER, fast_accumulation=False)(gm)
    product = only_call(gm, aten._scaled_mm.default)
    assert all(dtype(scale) == FLOAT and scale.op == "get_attr" for scale in product.args[2:4])  # type: ignore[union-attr, arg-type]
    assert product.args[7] is False
    trace(gm, x)


def test_names_do_not_depend_on_values() -> None:
    def code(seed: int) -> tuple[str, set[str]]:
        torch.manual_seed(seed)
        module = nn.Linear(32, 16)
        gm = quantized(module, torch.randn(3, 32), weight=per_channel(module), input=TOKENS)
        LinearsToScaledMm(HOPPER)(gm)
        return gm.code, set(gm.state_dict())

    assert code(0) == code(1)
    assert code(0)[1] == {"weight", "weight_scale_1", "bias"}, "the scale in its old shape is gone"


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 40), k=st.integers(1, 5), n=st.integers(1, 5), tokens=st.booleans(), seed=st.integers(0, 99))
def test_any_shape(rows: int, k: int, n: int, tokens: bool, seed: int) -> None:
    if tokens and torch.__version__ < "2.13":
        return
    torch.manual_seed(seed)
    module, x = nn.Linear(16 * k, 16 * n), torch.randn(rows, 16 * k)
    input = TOKENS if tokens else MEASURED
    gm = quantized(module, x, weight=ONE, input=input)
    LinearsToScaledMm(HOPPER)(gm)
    (got,) = run(gm, x)
    assert error(got, oracle(x, module, ONE, input)) <= 1e-6


def test_inductor_compiles_it() -> None:
    from torch._inductor.compile_fx import compile_fx

    x = torch.randn(3, 32, dtype=BF16)
    gm = quantized(Mlp(32, 64).to(BF16), x, weight=ONE, input=STATIC)
    (want,) = run(gm, x)
    LinearsToScaledMm(HOPPER)(gm)
    flat = torch.fx.GraphModule(gm, gm.graph)
    with torch.no_grad():
        (got,) = compile_fx(flat, [x])(x)
    assert error(got, np.asarray(want.double())) <= 1e-2
    assert re.search("_scaled_mm", gm.code)
