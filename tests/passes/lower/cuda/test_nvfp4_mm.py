"""NVFP4 as scaled products: tiles of scales against the index formula of cuBLAS, products against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.formats import FP8, NVFP4
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE
from passes.lower.cuda.nvfp4_mm import Nvfp4LinearsToScaledMm, in_tiles
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, only_call, rewrites, run
from tests.nvfp4 import global_scale, rounded
from tests.passes.blocks import error
from tests.passes.lower.cuda.support import BLACKWELL, HOPPER, emulated, quantized, trace

__all__ = ["emulated"]

ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 5e-4, torch.float32: 1e-6}
CONSUMER = Device("cuda", (12, 0))


def lower(device: Device = BLACKWELL) -> Any:
    return lambda: Nvfp4LinearsToScaledMm(device)


def graph(module: nn.Linear, x: Tensor, **options: Any) -> GraphModule:
    weight = Quantizer(NVFP4, global_scale(module.weight.detach()))
    return quantized(module, x, weight=weight, input=Quantizer(NVFP4, global_scale(x)), **options)


def oracle(x: Tensor, module: nn.Linear, scale: Tensor) -> Any:
    weight = module.weight.detach().float()
    result = rounded(x.float(), scale).astype(np.float64) @ rounded(weight, global_scale(weight)).astype(np.float64).T
    return result if module.bias is None else result + module.bias.detach().double().numpy()


@pytest.mark.everyday(2)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", [BLACKWELL, pytest.param(CONSUMER, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("columns", "width"), [(48, 64), (144, 96), (16, 32)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_against_the_oracle(to: torch.dtype, device: Device, columns: int, width: int, dynamic: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(width, columns).to(to), torch.randn(3, 50, width).to(to)
    gm = graph(module, x, **({"dynamic_shapes": ({0: DYNAMIC, 1: DYNAMIC},)} if dynamic else {}))
    other = x[:2, :3] if dynamic else x
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if to == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    rewrites(lower(device), gm, other, **tolerance)
    (got,) = run(gm, other)
    assert got.dtype == to and error(got, oracle(other, module, global_scale(x))) <= ROUNDING[to]
    assert [k.kernel for k in kernels(gm)] == ["scaled_mm, NVFP4"]
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE), count(gm, aten.linear.default)) == (1, 0, 0)
    (fake,) = trace(gm, other)
    assert fake.dtype == to and fake.shape == got.shape
    product = only_call(gm, aten._scaled_mm.default)
    assert product.args[6] == (torch.bfloat16 if to == torch.bfloat16 else torch.float32) and product.args[7] is False


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 300), blocks=st.integers(1, 20))
def test_tiles(rows: int, blocks: int) -> None:
    scales = torch.randint(0, 127, (rows, blocks), dtype=torch.uint8)
    tiles = in_tiles(scales.view(torch.float8_e4m3fn)).view(torch.uint8)
    columns = -(-blocks // 4)
    assert tiles.numel() == -(-rows // 128) * 128 * columns * 4 and int(tiles.sum()) == int(scales.sum())
    for r in range(0, rows, 17):
        for b in range(blocks):
            place = ((r // 128) * columns + b // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + b % 4
            assert tiles[place] == scales[r, b]


def test_a_whole_number_of_tiles_is_not_padded() -> None:
    x = torch.randn(128, 64)
    gm = graph(nn.Linear(64, 128), x)
    Nvfp4LinearsToScaledMm(BLACKWELL)(gm)
    assert count(gm, aten.constant_pad_nd.default) == 0
    assert set(gm.state_dict()) == {
        "weight",
        "weight_block_scale_1",
        "weight_global_scale_joint",
        "input_global_scale",
        "bias",
    }


@pytest.mark.usefixtures("emulated")
def test_a_global_scale_that_is_measured() -> None:
    class Measured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x, module = torch.randn(4, 64), Measured()
    gm = quantized(module, x, weight=Quantizer(NVFP4, torch.tensor(0.01)), input=Quantizer(NVFP4, torch.tensor(0.01)))
    dynamic = only_call(gm, DYNAMIC_QUANTIZE)
    constant = dynamic.args[1]
    with gm.graph.inserting_before(dynamic):
        measured = gm.graph.call_function(aten.alias.default, (constant,))
    measured.meta = dict(constant.meta)  # type: ignore[union-attr]
    constant.replace_all_uses_with(measured, delete_user_cb=lambda user: user is not measured)  # type: ignore[union-attr]
    rewrites(lower(), gm, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "sizes", "reason"),
    [
        (HOPPER, (64, 32), "compute capability 9.0 has no FP4 matrix units"),
        (BLACKWELL, (48, 32), "K = 48 is no multiple of 32"),
        (BLACKWELL, (64, 40), "N = 40 is no multiple of 16"),
    ],
)
def test_declines(device: Device, sizes: tuple[int, int], reason: str) -> None:
    assert declines(lower(device), graph(nn.Linear(*sizes), torch.randn(4, sizes[0]))) == [reason]


def test_declines_another_weight() -> None:
    one = Quantizer(FP8, torch.tensor(0.01))
    gm = quantized(nn.Linear(64, 32), torch.randn(4, 64), weight=one, input=Quantizer(NVFP4, torch.tensor(0.01)))
    assert declines(lower(), gm) == ["the input is in NVFP4, and the weight in fp8"]


@pytest.mark.usefixtures("emulated")
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 140), k=st.integers(1, 5), n=st.integers(1, 10), seed=st.integers(0, 99))
def test_any_shape(rows: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = nn.Linear(32 * k, 16 * n), torch.randn(rows, 32 * k)
    gm = graph(module, x)
    Nvfp4LinearsToScaledMm(BLACKWELL)(gm)
    assert error(run(gm, x)[0], oracle(x, module, global_scale(x))) <= 1e-5
    trace(gm, x)
