"""INT8 linear layers as integer products, which torch runs on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.formats import INT8, INT8_PER_TOKEN
from passes.graph import aten
from passes.ir import DEQUANTIZE
from passes.lower.device import Device
from passes.lower.int_mm import LinearsToIntMm
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, rewrites, run
from tests.passes.blocks import error
from tests.passes.lower.cuda.support import AMPERE, emulated, quantized, trace
from tests.passes.support import Mlp, scale_of

__all__ = ["emulated"]

STATIC, MEASURED, TOKENS = Quantizer(INT8, torch.tensor(0.03)), Quantizer(INT8, None), Quantizer(INT8_PER_TOKEN, None)
ONE = Quantizer(INT8, torch.tensor(0.002))


def lower(device: Device = AMPERE) -> Any:
    return lambda: LinearsToIntMm(device)


def int8(x: Tensor, scale: Tensor) -> Any:
    values, factor = (t.detach().float().numpy() for t in (x, scale))
    return np.clip(np.rint(values / factor), -128, 127).astype(np.float64) * factor.astype(np.float64)


def oracle(x: Tensor, module: nn.Linear, weight: Quantizer, input: Quantizer) -> Any:
    scale = input.scale
    if scale is None:
        amax = x.abs().amax(-1, keepdim=True) if input is TOKENS else x.abs().amax()
        scale = amax.float() / 127
    assert weight.scale is not None
    result = int8(x, scale) @ int8(module.weight, weight.scale).T
    return result if module.bias is None else result + module.bias.detach().double().numpy()


@pytest.mark.everyday(8)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("input", [STATIC, MEASURED, TOKENS], ids=["static", "measured", "tokens"])
@pytest.mark.parametrize("channels", [False, True], ids=["one", "rows"])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_every_form(to: torch.dtype, input: Quantizer, channels: bool, rows: int) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 40).to(to), torch.randn(rows, 24).to(to)
    weight = Quantizer(INT8, scale_of(module.weight.detach(), INT8, per_channel=True)) if channels else ONE
    gm = quantized(module, x, weight=weight, input=input)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if to == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    rewrites(lower(), gm, x, **tolerance)
    (got,) = run(gm, x)
    assert got.dtype == to
    rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[to]
    assert error(got, oracle(x, module, weight, input)) <= rounding
    assert (count(gm, aten._int_mm.default), count(gm, DEQUANTIZE)) == (1, 0)
    assert count(gm, aten.constant_pad_nd.default) == (rows < 17)
    assert [k.kernel for k in kernels(gm)] == ["int_mm"]
    trace(gm, x)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_number_of_rows_that_is_not_known(rows: int) -> None:
    x = torch.randn(3, 4, 24)
    gm = quantized(Mlp(24, 32), x, weight=ONE, input=MEASURED, dynamic_shapes=({0: DYNAMIC},))
    rewrites(lower(), gm, torch.randn(rows, 4, 24), fired=2, rtol=1e-4, atol=1e-4)
    assert count(gm, aten.constant_pad_nd.default) == 2
    trace(gm, torch.randn(rows, 4, 24))


@pytest.mark.parametrize(
    ("device", "sizes", "weight", "reason"),
    [
        (Device("cuda", (7, 5)), (24, 40), ONE, "compute capability 7.5 is not known to multiply INT8 fast"),
        (AMPERE, (20, 40), ONE, "K = 20 is no multiple of 8"),
        (AMPERE, (24, 12), ONE, "N = 12 is no multiple of 8"),
        (AMPERE, (8, 8), Quantizer(INT8, torch.full((1, 8), 0.1)), "the weight has scales along the reduction axis"),
    ],
)
def test_declines(device: Device, sizes: tuple[int, int], weight: Quantizer, reason: str) -> None:
    gm = quantized(nn.Linear(*sizes), torch.randn(20, sizes[0]), weight=weight, input=STATIC)
    assert declines(lower(device), gm) == [reason]


@pytest.mark.parametrize(("weight", "input"), [(None, STATIC), (ONE, None), (None, None)])
def test_layers_that_are_not_quantized_as_a_whole_stay(weight: Quantizer | None, input: Quantizer | None) -> None:
    assert declines(lower(), quantized(nn.Linear(24, 40), torch.randn(20, 24), weight=weight, input=input)) == []


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 40), k=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape(rows: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = nn.Linear(8 * k, 8 * n), torch.randn(rows, 8 * k)
    gm = quantized(module, x, weight=ONE, input=TOKENS)
    LinearsToIntMm(AMPERE)(gm)
    assert error(run(gm, x)[0], oracle(x, module, ONE, TOKENS)) <= 1e-6
