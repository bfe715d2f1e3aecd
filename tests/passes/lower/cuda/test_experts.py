"""FP8 experts as one scaled product or a grouped one, against numpy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.formats import FP8, FP8_PER_TOKEN
from passes.graph import aten
from passes.ir import BATCHED_LINEAR
from passes.lower.cuda.experts import ExpertsToScaledMm
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, rewrites, run
from tests.passes.blocks import error
from tests.passes.lower.cuda.support import ADA, AMPERE, BLACKWELL, HOPPER, emulated, fp8, quantized, trace

__all__ = ["emulated"]

STATIC, TOKENS = Quantizer(FP8, torch.tensor(0.01)), Quantizer(FP8_PER_TOKEN, None)
BF16 = torch.bfloat16


class Experts(nn.Module):
    def __init__(self, experts: int = 3, rows: int = 48, width: int = 32, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, rows, width) / 4)
        self.bias = nn.Parameter(torch.randn(experts, rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qcompile.batched_linear(x, self.weight, self.bias)


def lower(device: Device = HOPPER) -> Any:
    return lambda: ExpertsToScaledMm(device)


def oracle(x: Tensor, module: Experts, weight: Tensor, tokens: bool) -> Any:
    scale = x.abs().amax(-1, keepdim=True).float() / 448 if tokens else torch.tensor(0.01)
    result = fp8(x, scale) @ fp8(module.weight, weight).swapaxes(-1, -2)
    return result if module.bias is None else result + module.bias.detach().double().numpy()[:, None]


@pytest.mark.everyday(4)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "same rows"])
@pytest.mark.parametrize("input", [STATIC, TOKENS], ids=["static", "tokens"])
@pytest.mark.parametrize("scale", ["one", "experts", "rows"])
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_against_the_oracle(shared: bool, input: Quantizer, scale: str, bias: bool) -> None:
    torch.manual_seed(0)
    module, x = Experts(bias=bias).to(BF16), torch.randn(1 if shared else 3, 5, 32).to(BF16)
    sizes = {"one": (), "experts": (3, 1, 1), "rows": (3, 48, 1)}[scale]
    weight = torch.rand(sizes) * 0.003 + 0.001
    gm = quantized(module, x, weight=Quantizer(FP8, weight), input=input, dynamic_shapes=({1: DYNAMIC},))
    other = torch.randn(1 if shared else 3, 7, 32).to(BF16)
    rewrites(lower(), gm, other, rtol=2e-2, atol=3e-2)
    (got,) = run(gm, other)
    assert error(got, oracle(other, module, weight, input is TOKENS)) <= 5e-3
    ours = aten._scaled_mm.default if shared else aten._scaled_grouped_mm.default
    assert (count(gm, BATCHED_LINEAR), count(gm, ours)) == (0, 1)
    (kernel,) = kernels(gm)
    assert kernel.kernel.startswith("scaled_mm" if shared else "scaled_grouped_mm")
    (fake,) = trace(gm, other)
    assert fake.shape == (3, 7, 48) and fake.dtype == BF16


@pytest.mark.usefixtures("emulated")
def test_float32_experts_with_the_same_rows() -> None:
    module, x = Experts(), torch.randn(1, 5, 32)
    gm = quantized(module, x, weight=Quantizer(FP8, torch.rand(3, 48, 1) / 100), input=TOKENS)
    rewrites(lower(BLACKWELL), gm, x, rtol=1e-5, atol=1e-5)
    assert kernels(gm)[0].kernel == "scaled_mm, scales of rows after it"


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    ("device", "to", "module", "reason"),
    [
        (AMPERE, BF16, Experts(), "compute capability 8.0 has no FP8 matrix units"),
        (ADA, BF16, Experts(), "compute capability 8.9 has no grouped FP8 product, which torch has on Hopper alone"),
        (BLACKWELL, BF16, Experts(), "compute capability 10.0 has no grouped FP8 product, which torch has on Hopper"),
        (HOPPER, torch.float16, Experts(), "the grouped FP8 product gives bfloat16, and these experts compute in"),
        (HOPPER, BF16, Experts(rows=40), "N = 40 is no multiple of 16"),
        (HOPPER, BF16, Experts(width=24), "K = 24 is no multiple of 16"),
    ],
)
def test_declines(device: Device, to: torch.dtype, module: Experts, reason: str) -> None:
    x = torch.randn(3, 5, module.weight.shape[-1]).to(to)
    gm = quantized(module.to(to), x, weight=Quantizer(FP8, torch.tensor(0.01)), input=STATIC)
    (got,) = declines(lower(device), gm)
    assert got.startswith(reason)
