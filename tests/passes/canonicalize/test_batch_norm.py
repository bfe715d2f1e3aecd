"""Batch norms behind convolutions that another tool quantized, judged by the values and codes there were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.base import run_pipeline
from passes.canonicalize.batch_norm import FoldBatchNormIntoScales
from passes.constants import constant
from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE, quantize
from passes.normalize.convolution import NormalizeConvolution
from passes.testing import count, declines, graph_of, only_call, rewrites

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NORM = aten._native_batch_norm_legit_no_training.default


class Quantized(nn.Module):
    """A norm behind a convolution whose weight has a scale for each channel."""

    def __init__(self, *, fmt: str = "int8", bias: bool = True, second: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), nn.BatchNorm2d(6)
        self.requires_grad_(False)
        self.fmt, self.second = fmt, second
        for values in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(values)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        self.norm.weight[1] *= -self.norm.weight[1].sign() * self.norm.weight[0].sign()  # of both signs
        largest = {"int8": 127, "fp8": 448}[fmt]
        amax = self.conv.weight.abs().amax((1, 2, 3), keepdim=True)
        self.register_buffer("scale", amax / largest)

    def forward(self, x: Tensor) -> Any:
        weight = QUANTIZE(self.conv.weight, self.scale, format=self.fmt)
        weight = DEQUANTIZE(weight, self.scale, format=self.fmt, dtype=x.dtype)
        bias = self.conv.bias
        if self.second == "bias" and bias is not None:
            bias = bias * x.mean()
        y = nn.functional.conv2d(x, weight, bias, padding=1, groups=2)
        result = self.norm(y)
        return {"layer": (result, y), "weight": (result, weight.sum())}.get(self.second, result)


def graph(module: nn.Module) -> Any:
    gm = graph_of(module, X)
    run_pipeline((NormalizeConvolution,), gm)
    return gm


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_take_the_norm_and_codes_their_sign(fmt: str, bias: bool) -> None:
    module = Quantized(fmt=fmt, bias=bias)
    gm = graph(module)
    rewrites(FoldBatchNormIntoScales, gm, X, **CLOSE)
    assert count(gm, NORM, QUANTIZE) == 0
    factor = module.norm.weight / (module.norm.running_var + 1e-5).sqrt()  # type: ignore[operator]
    assert bool((factor < 0).any()) and bool((factor > 0).any())
    codes = quantize(module.conv.weight, module.scale, format=fmt).float() * factor.sign().reshape(-1, 1, 1, 1)
    state = gm.state_dict()
    assert torch.equal(state["conv.weight"].float(), codes) and state["conv.weight"].itemsize == 1
    torch.testing.assert_close(state["scale"], module.scale * factor.abs().reshape(-1, 1, 1, 1))
    assert "conv.bias" in state or not bias


def test_a_channel_that_the_norm_takes_away_has_zeros_for_codes() -> None:
    module = Quantized()
    module.norm.weight[0] = 0
    gm = graph(module)
    rewrites(FoldBatchNormIntoScales, gm, X, **CLOSE)
    scale = constant(gm, only_call(gm, DEQUANTIZE).args[1])
    assert scale is not None and bool((scale > 0).all()) and not gm.state_dict()["conv.weight"][0].any()


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("layer", "has another reader"),
        ("weight", "another layer reads the weight"),
        ("bias", "computed at run time"),
    ],
)
def test_what_something_else_reads_stays(second: str, reason: str) -> None:
    assert any(reason in told for told in declines(FoldBatchNormIntoScales, graph(Quantized(second=second))))


def test_the_lowest_code_has_no_other_sign() -> None:
    module = Quantized()
    module.scale[1] = module.conv.weight[1].abs().amax() / 128.4
    module.conv.weight[1].mul_(-module.conv.weight[1].flatten()[module.conv.weight[1].abs().argmax()].sign())
    module.norm.weight[1] = -1
    assert declines(FoldBatchNormIntoScales, graph(module), reason="lowest code")


def test_scales_that_leave_float32() -> None:
    module = Quantized()
    module.scale[2] = 1e38
    module.norm.weight[2] = 100
    assert declines(FoldBatchNormIntoScales, graph(module), reason="leaves float32")


def test_one_scale_is_not_looked_at() -> None:
    module = Quantized()
    module.scale = module.scale.amax()
    assert declines(FoldBatchNormIntoScales, graph(module)) == []
