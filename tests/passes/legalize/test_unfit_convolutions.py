"""Convolutions that no kernel of TensorRT takes go back to floating point, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.base import run_pipeline
from passes.fold.weights import FoldWeights
from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.legalize.unfit_convolutions import LeaveUnfitConvolutions
from passes.normalize.convolution import NormalizeConvolution
from passes.testing import count, declines, graph_of, only_call, run

X = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))


class Quantized(nn.Module):
    """A convolution with codes for its weight and, or, its input."""

    def __init__(self, layer: Any, fmt: str, *, given: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.layer, self.fmt, self.given, self.twice = layer.requires_grad_(False), fmt, given, twice
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("channels", torch.full((layer.weight.shape[0], *[1] * 3), 0.003))

    def forward(self, x: Tensor) -> Any:
        q = DEQUANTIZE(QUANTIZE(x, self.scale, format=self.fmt), self.scale, format=self.fmt, dtype=x.dtype)
        w = QUANTIZE(self.layer.weight, self.channels, format=self.fmt)
        w = DEQUANTIZE(w, self.channels, format=self.fmt, dtype=x.dtype)
        call = nn.functional.conv_transpose2d if isinstance(self.layer, nn.ConvTranspose2d) else nn.functional.conv2d
        y = call(q if self.given else x, w, self.layer.bias, groups=self.layer.groups)
        return (y, w.sum(), q.sum()) if self.twice else y


def graph(module: nn.Module) -> Any:
    gm = graph_of(module, X)
    run_pipeline((NormalizeConvolution, FoldWeights), gm)
    return gm


@pytest.mark.parametrize(
    ("layer", "fmt", "reason"),
    [
        (lambda: nn.Conv2d(4, 6, 7), "fp8", "at most 32 elements"),
        (lambda: nn.Conv2d(4, 4, 8, groups=4), "fp8", "at most 32 elements"),
        (lambda: nn.ConvTranspose2d(4, 6, 2), "fp8", "transposed"),
        (lambda: nn.ConvTranspose2d(4, 6, 2), "int8", "transposed"),
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_it_is_computed_from_what_the_codes_stand_for(layer: Any, fmt: str, reason: str, twice: bool) -> None:
    module = Quantized(layer(), fmt, twice=twice)
    gm, half = graph(module), Quantized(module.layer, fmt, given=False, twice=twice)
    make = LeaveUnfitConvolutions()
    assert make(gm).modified and reason in make.log.declined[0].reason
    assert torch.equal(run(gm, X)[0], run(graph(half), X)[0])
    (x, weight), state = only_call(gm, aten.convolution.default).args[:2], gm.state_dict()
    assert x.op == "placeholder" and weight.op == "get_attr"  # type: ignore[union-attr]
    assert count(gm, DEQUANTIZE) == (1 if twice else 0) and state["layer.weight"].dtype == torch.float32
    assert "channels" not in state
    assert not LeaveUnfitConvolutions()(gm).modified


@pytest.mark.parametrize(
    ("layer", "fmt", "given"),
    [
        (lambda: nn.Conv2d(4, 6, 3), "fp8", True),
        (lambda: nn.Conv2d(4, 4, 7, groups=4), "fp8", True),  # SM120 has a kernel
        (lambda: nn.Conv2d(4, 6, 7), "int8", True),
        (lambda: nn.Conv2d(4, 6, 7), "fp8", False),  # as it was asked for
    ],
)
def test_others_stay(layer: Any, fmt: str, given: bool) -> None:
    assert declines(LeaveUnfitConvolutions, graph(Quantized(layer(), fmt, given=given))) == []
