"""The pipeline for CUDA on whole models: every device has a form for every layer, and torch accepts it."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.base import PassLog, run_pipeline
from passes.formats import FP8, FP8_PER_TOKEN, INT8, NVFP4
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.ir import ATTENTION, BATCHED_LINEAR, DEQUANTIZE
from passes.lower.cuda.pipeline import cuda_pipeline
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.normalize.views import ViewsToReshape
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, run
from tests.passes.blocks import INPUT, WEIGHT, error
from tests.passes.lower.cuda.support import ADA, AMPERE, BLACKWELL, HOPPER, emulated, quantized, trace
from tests.passes.support import Attention, insert

__all__ = ["emulated"]

BF16 = torch.bfloat16
RECIPES = {
    "fp8": (Quantizer(FP8, torch.tensor(0.002)), Quantizer(FP8, torch.tensor(0.01))),
    "tokens": (Quantizer(FP8, torch.full((128, 1), 0.002)), Quantizer(FP8_PER_TOKEN, None)),
    "blocks": (WEIGHT, INPUT),
    "nvfp4": (Quantizer(NVFP4, torch.tensor(1e-4)), Quantizer(NVFP4, torch.tensor(2e-3))),
    "int8": (Quantizer(INT8, torch.tensor(0.002)), Quantizer(INT8, torch.tensor(0.02))),
    "weights": (Quantizer(FP8, torch.tensor(0.002)), None),
    "fp4 weights": (Quantizer(NVFP4, torch.tensor(1e-4)), None),
}
FORMS = {
    "fp8": ("mm", "scaled_mm", "scaled_mm", "scaled_mm"),
    "tokens": ("mm", "scaled_mm", "scaled_mm", "scaled_mm"),
    "blocks": ("mm", "mm", "scaled_mm", "mm"),
    "nvfp4": ("mm", "mm", "mm", "scaled_mm"),
    "int8": ("int_mm", "int_mm", "int_mm", "int_mm"),
    "weights": ("mm", "mm", "mm", "mm"),
    "fp4 weights": ("mm", "mm", "mm", "mm"),
}
# codes of the second layer can differ by one where the first is rounded once and not twice
ROUNDING = dict.fromkeys(RECIPES, 0.01) | {"nvfp4": 0.03}
DEVICES = (*(pytest.param(device, marks=pytest.mark.slow) for device in (AMPERE, ADA)), HOPPER, BLACKWELL)


class Block(nn.Module):
    """Attention with its projections, and an MLP; all matrices are 128 x 128."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(4, 32)
        self.out, self.up, self.down = (nn.Linear(128, 128) for _ in range(3))
        self.norm = nn.LayerNorm(128)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x).transpose(1, 2)
        x = x + self.out(y.reshape(*x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def block(name: str) -> tuple[GraphModule, Tensor]:
    torch.manual_seed(1)
    return copy.deepcopy(_quantized_block(name)), torch.randn(3, 9, 128).to(BF16)


@functools.cache
def _quantized_block(name: str) -> GraphModule:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 128).to(BF16)
    weight, input = RECIPES[name]
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    gm = quantized(Block().to(BF16).eval(), x, weight=weight, input=input, dynamic_shapes=shapes)
    ViewsToReshape()(gm)  # attention's output lies in memory otherwise on a GPU
    return gm


@pytest.mark.everyday(1)
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_every_device(name: str, device: Device) -> None:
    gm, x = block(name)
    (want,) = run(gm, x)
    log = run_pipeline(cuda_pipeline(device), gm, PassLog())
    (got,) = run(gm, x)
    assert error(got, want.double().numpy()) <= (0.08 if any(k.dropped for k in kernels(gm)) else ROUNDING[name])
    form = FORMS[name][DEVICES.index(device)]
    layers = [f"attention.{p}_proj" for p in "qkv"] + ["out", "up", "down"]
    assert [k.layer for k in kernels(gm)] == layers
    assert Counter(k.kernel.split(",")[0].split(" ")[0] for k in kernels(gm)) == Counter([form] * 6)
    assert len(log.declined) in (0, 6) and bool(log.declined) == (form == "mm" and "weights" not in name)
    (fake,) = trace(gm, x)
    assert fake.shape == x.shape and fake.dtype == BF16
    code = gm.code
    run_pipeline(cuda_pipeline(device), gm)
    assert gm.code == code


@pytest.mark.everyday(2)
@pytest.mark.parametrize("name", ["fp8", "tokens", "nvfp4", "blocks"])
def test_no_fp8_is_left_for_a_device_that_cannot_read_it(name: str) -> None:
    gm, _ = block(name)
    run_pipeline(cuda_pipeline(AMPERE), gm)
    assert count(gm, DEQUANTIZE) == 0
    assert {t.dtype for t in gm.state_dict().values()} == {BF16}


def test_attention_and_linear_layers_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 128).to(BF16)
    module = Block().to(BF16).eval()
    module.attention.options["scale"] = 1.0
    gm = quantized(module, x, weight=RECIPES["fp8"][0], input=RECIPES["fp8"][1])
    ViewsToReshape()(gm)
    insert(gm, dict.fromkeys("qkv", torch.tensor(0.02)))
    assert FuseAttentionQdq()(gm).modified
    run_pipeline(cuda_pipeline(HOPPER), gm)
    assert (count(gm, ATTENTION, BATCHED_LINEAR, DEQUANTIZE)) == 0
    assert [k.kernel for k in kernels(gm) if k.dropped] == ["scaled_dot_product_attention"]
    assert [k.layer for k in kernels(gm)][3] == "attention" and len(kernels(gm)) == 7
    trace(gm, x)
