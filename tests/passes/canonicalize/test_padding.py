"""Padding between a quantizer and its convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from passes.base import run_pipeline
from passes.canonicalize.padding import PadBeforeQuantizers
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.normalize.convolution import NormalizeConvolution
from passes.testing import DYNAMIC, declines, graph_of, only_call, rewrites

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """A convolution of `pad(dequantize(quantize(x + offset)) - offset)`."""

    def __init__(self, mode: str = "reflect", offset: float = 0.0, value: float | None = None, scales: Any = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.register_buffer("scale", torch.as_tensor(scales))
        self.mode, self.offset, self.value = mode, offset, value

    def forward(self, x: Tensor) -> Tensor:
        codes = QUANTIZE(x + self.offset if self.offset else x, self.scale, format="int8")
        y = DEQUANTIZE(codes, self.scale, format="int8", dtype=x.dtype)
        y = y - self.offset if self.offset else y
        if self.mode == "same":
            return conv2d(y, self.weight[:, :, :2, :2], padding="same")
        return conv2d(pad(y, [1, 2, 1, 0], self.mode, self.value), self.weight)


def graph(module: nn.Module, **options: Any) -> Any:
    gm = graph_of(module, X, **options)
    run_pipeline((NormalizeConvolution,), gm)
    return gm


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "constant", "same"])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_padding_moves_in_front(mode: str, offset: float) -> None:
    for options in ({}, {"dynamic_shapes": ({0: DYNAMIC},)}):
        gm = graph(Padded(mode, offset), **options)
        rewrites(PadBeforeQuantizers, gm, X)
        operand = only_call(gm, aten.convolution.default).args[0]
        assert operand.target is (aten.sub.Tensor if offset else DEQUANTIZE)  # type: ignore[union-attr]


def test_other_numbers_and_more_scales_stay() -> None:
    assert declines(PadBeforeQuantizers, graph(Padded("constant", value=1.0))) == []
    assert declines(PadBeforeQuantizers, graph(Padded(scales=torch.full((1, 4, 1, 1), 0.1)))) == []


def test_what_is_measured_stays() -> None:
    class Measured(Padded):
        def forward(self, x: Tensor) -> Tensor:
            codes, scale = DYNAMIC_QUANTIZE(x, None, format="int8")
            return conv2d(pad(DEQUANTIZE(codes, scale, format="int8", dtype=x.dtype), [1, 1]), self.weight)

    assert declines(PadBeforeQuantizers, graph(Measured())) == []


def test_another_reader_keeps_what_it_reads() -> None:
    class Two(Padded):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), DEQUANTIZE(self.codes(x), self.scale, format="int8", dtype=x.dtype).sum()

        def codes(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.qcompile.quantize(x, self.scale, format="int8")
            return result

    rewrites(PadBeforeQuantizers, graph(Two()), X, second_user=True)
