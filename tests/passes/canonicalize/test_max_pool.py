"""Quantizers in front of max poolings move behind them, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.canonicalize.max_pool import QuantizeBehindMaxPool
from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.testing import DYNAMIC, declines, graph_of, only_call, rewrites

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Pooled(nn.Module):
    """A max pooling of `dequantize(quantize(x + offset)) - offset`."""

    def __init__(self, fmt: str = "int8", offset: float = 0.0, scales: Any = 0.02, reader: bool = False) -> None:
        super().__init__()
        self.pool, self.fmt, self.offset, self.reader = nn.MaxPool2d(3, 2, 1), fmt, offset, reader
        self.register_buffer("scale", torch.as_tensor(scales))

    def forward(self, x: Tensor) -> Any:
        codes = QUANTIZE(x + self.offset if self.offset else x, self.scale, format=self.fmt)
        y = DEQUANTIZE(codes, self.scale, format=self.fmt, dtype=x.dtype)
        y = y - self.offset if self.offset else y
        return (self.pool(y), y.sum()) if self.reader else self.pool(y)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_pooling_moves_in_front(fmt: str, offset: float) -> None:
    for shapes in (None, ({0: DYNAMIC, 2: DYNAMIC},)):
        gm = graph_of(Pooled(fmt, offset), X, dynamic_shapes=shapes)
        rewrites(QuantizeBehindMaxPool, gm, X * 3)  # beyond the largest code
        pool = only_call(gm, aten.max_pool2d.default)
        assert pool.args[0].op == "placeholder"  # type: ignore[union-attr]


def test_what_something_else_reads_and_more_scales_stay() -> None:
    assert declines(QuantizeBehindMaxPool, graph_of(Pooled(reader=True), X)) == []
    assert declines(QuantizeBehindMaxPool, graph_of(Pooled(scales=torch.full((1, 4, 1, 1), 0.1)), X)) == []
    assert declines(QuantizeBehindMaxPool, graph_of(nn.MaxPool2d(2), X)) == []
