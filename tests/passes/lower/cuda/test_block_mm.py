"""FP8 in blocks of 128 as scaled products: strides and padding as cuBLAS reads them, against an oracle in numpy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.formats import FP8, FP8_1X128
from passes.graph import aten, val
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE
from passes.lower.cuda.block_mm import BlockLinearsToScaledMm
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, only_call, rewrites, run
from tests.passes.blocks import INPUT, WEIGHT, error, oracle
from tests.passes.lower.cuda.support import ADA, BLACKWELL, HOPPER, emulated, quantized, trace

__all__ = ["emulated"]

SQUARE, ROWS = "scaled_mm, blocks of 1 x 128 and 128 x 128", "scaled_mm, blocks of 1 x 128"
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def lower(device: Device = HOPPER) -> Any:
    return lambda: BlockLinearsToScaledMm(device)


@pytest.mark.everyday(2)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("columns", "width", "kernel"),
    [(256, 512, SQUARE), (128, 1024, SQUARE), (256, 384, ROWS), (208, 512, ROWS), (64, 128, ROWS)],
)
def test_against_the_oracle(to: torch.dtype, columns: int, width: int, kernel: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(width, columns).to(to), torch.randn(2, 4, width).to(to)
    gm = quantized(module, x, weight=WEIGHT, input=INPUT, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    other = torch.randn(3, 7, width).to(to)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if to == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    rewrites(lower(), gm, other, **tolerance)
    (got,) = run(gm, other)
    assert got.dtype == to and error(got, oracle(other, module.weight, module.bias)) <= ROUNDING[to]
    assert [k.kernel for k in kernels(gm)] == [kernel]
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE), count(gm, aten.constant_pad_nd.default)) == (1, 0, 2)
    (fake,) = trace(gm, other)
    assert fake.shape == (3, 7, columns) and fake.dtype == to


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_rows_are_padded_where_they_must_be(rows: int) -> None:
    module, x = nn.Linear(256, 128), torch.randn(rows, 256)
    gm = quantized(module, x, weight=WEIGHT, input=INPUT)
    rewrites(lower(), gm, x, rtol=1e-5, atol=1e-5)
    assert count(gm, aten.constant_pad_nd.default) == (2 if rows % 4 else 0)
    assert count(gm, aten.slice.Tensor) == bool(rows % 4)
    assert error(run(gm, x)[0], oracle(x, module.weight, module.bias)) <= 1e-6
    trace(gm, x)


def test_the_scales_lie_as_cublas_reads_them() -> None:
    gm = quantized(nn.Linear(512, 256), torch.randn(8, 512), weight=WEIGHT, input=INPUT)
    BlockLinearsToScaledMm(HOPPER)(gm)
    product = only_call(gm, aten._scaled_mm.default)
    layouts = [(tuple(val(n).shape), val(n).stride()) for n in product.args[:4]]  # type: ignore[arg-type, union-attr]
    assert layouts == [((8, 512), (512, 1)), ((512, 256), (1, 512)), ((8, 4), (1, 8)), ((4, 2), (1, 4))]
    assert set(gm.state_dict()) == {"weight", "weight_scale", "bias"}


@pytest.mark.usefixtures("emulated")
def test_a_weight_in_rows_of_blocks() -> None:
    module, x = nn.Linear(512, 128), torch.randn(4, 512)
    gm = quantized(module, x, weight=Quantizer(FP8_1X128, None), input=INPUT)
    rewrites(lower(), gm, x, rtol=1e-5, atol=1e-5)
    assert [k.kernel for k in kernels(gm)] == [ROWS]
    assert set(gm.state_dict()) == {"weight", "weight_scale_rows", "bias"}


@pytest.mark.usefixtures("emulated")
def test_another_user_of_the_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 24)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(4, 128)
    gm = quantized(Two(), x, weight=WEIGHT, input=INPUT)
    log = rewrites(lower(), gm, x, rtol=1e-4, atol=1e-4)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, aten.linear.default)) == (1, 1)
    assert [d.reason for d in log.declined] == ["N = 24 is no multiple of 16"]


@pytest.mark.parametrize(
    ("device", "sizes", "weight", "reason"),
    [
        (ADA, (128, 128), WEIGHT, "compute capability 8.9 has no product of FP8 in blocks of 128, which cuBLAS has on"),
        (BLACKWELL, (128, 128), WEIGHT, "compute capability 10.0 has no product of FP8 in blocks of 128"),
        (HOPPER, (192, 128), WEIGHT, "K = 192 is no multiple of 128"),
        (HOPPER, (128, 40), WEIGHT, "N = 40 is no multiple of 16"),
        (HOPPER, (128, 128), Quantizer(FP8, torch.tensor(0.1)), "the input is in blocks of 128, and the weight in fp8"),
    ],
)
def test_declines(device: Device, sizes: tuple[int, int], weight: Quantizer, reason: str) -> None:
    gm = quantized(nn.Linear(*sizes), torch.randn(4, sizes[0]), weight=weight, input=INPUT)
    (got,) = declines(lower(device), gm)
    assert got.startswith(reason)


@pytest.mark.usefixtures("emulated")
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 9), k=st.integers(1, 5), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_any_shape(rows: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = nn.Linear(128 * k, 16 * n), torch.randn(rows, 128 * k)
    gm = quantized(module, x, weight=WEIGHT, input=INPUT)
    BlockLinearsToScaledMm(HOPPER)(gm)
    assert error(run(gm, x)[0], oracle(x, module.weight, module.bias)) <= 1e-5
    trace(gm, x)
