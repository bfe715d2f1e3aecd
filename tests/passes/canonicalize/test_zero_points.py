"""The zero point of a layer's input in its bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.canonicalize.zero_points import MoveZeroPoints
from passes.constants import ConstantRows
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.normalize.convolution import NormalizeConvolution
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites


class Shifted(nn.Module):
    """A linear layer on `dequantize(...) - offset`, as `Pt2eToQdq` writes a zero point."""

    def __init__(self, offset: float, *, bias: bool = True, weight: str = "float", second: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=bias)
        self.offset, self.weight, self.second = offset, weight, second
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("rows", torch.full((4, 1), 0.01))
        self.register_buffer("block", torch.full((1, 1), 0.01))
        self.register_buffer("codes", torch.randn(4, 8).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Any:
        codes = QUANTIZE(x + self.offset, self.scale, format="int8")
        shifted = DEQUANTIZE(codes, self.scale, format="int8", dtype=x.dtype) - self.offset
        weight = self.linear.weight
        if self.weight == "quantized":
            weight = DEQUANTIZE(QUANTIZE(weight, self.rows, format="int8"), self.rows, format="int8", dtype=x.dtype)
        elif self.weight == "measured":
            codes, scale = DYNAMIC_QUANTIZE(weight, None, format="int8")
            weight = DEQUANTIZE(codes, scale, format="int8", dtype=x.dtype)
        elif self.weight == "blocks":
            codes, scale = DYNAMIC_QUANTIZE(weight, None, format="fp8_128x128")
            weight = DEQUANTIZE(codes, self.block, format="fp8_128x128", dtype=x.dtype)
        elif self.weight == "stored blocks":
            weight = DEQUANTIZE(self.codes, self.block, format="fp8_128x128", dtype=x.dtype)
        elif self.weight == "computed":
            weight = weight * x.mean()
        bias = self.linear.bias * x.mean() if self.weight == "bias" else self.linear.bias
        result = nn.functional.linear(shifted, weight, bias)
        return (result, shifted) if self.second else result


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("weight", ["float", "quantized"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [None, ({0: DYNAMIC},)])
def test_the_offset_moves_behind_the_product(weight: str, bias: bool, dynamic: Any) -> None:
    gm = graph_of(Shifted(0.7, bias=bias, weight=weight), X, dynamic_shapes=dynamic)
    rewrites(MoveZeroPoints, gm, X, **CLOSE)
    assert count(gm, aten.sub.Tensor) == 0 and count(gm, aten.linear.default) == 1
    assert str(only_call(gm, aten.linear.default).args[2].target).startswith("linear.bias" if bias else "bias")  # type: ignore[union-attr]


def test_one_scale_serves_every_piece_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConstantRows, "_CHUNK", 16)  # two rows at a time
    module = Shifted(0.7, weight="quantized")
    module.rows = torch.full((1, 1), 0.01)
    gm = graph_of(module, X)
    rewrites(MoveZeroPoints, gm, X, **CLOSE)


def test_another_reader_keeps_the_shifted_values() -> None:
    gm = graph_of(Shifted(0.7, second=True), X)
    rewrites(MoveZeroPoints, gm, X, **CLOSE)
    assert count(gm, aten.sub.Tensor) == 1


@pytest.mark.everyday(1)
@pytest.mark.parametrize("weight", ["computed", "measured", "blocks", "stored blocks", "bias"])
def test_a_weight_or_bias_that_is_computed_is_left(weight: str) -> None:
    (reason,) = declines(MoveZeroPoints, graph_of(Shifted(0.7, weight=weight), X))
    assert "computed at run time" in reason


def test_a_tensor_that_is_subtracted_is_no_zero_point() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor(0.05)
            y = DEQUANTIZE(QUANTIZE(x, scale, format="int8"), scale, format="int8", dtype=x.dtype)
            return self.linear(y - x.mean()) + self.linear(x - 0.5)

    assert declines(MoveZeroPoints, graph_of(Centred(), X)) == []


def test_a_layer_without_a_zero_point_is_left() -> None:
    assert declines(MoveZeroPoints, graph_of(nn.Linear(8, 4), X)) == []


@settings(max_examples=6, deadline=None)
@given(offset=st.floats(-100, 100, allow_nan=False, width=32), rows=st.integers(1, 4))
def test_any_offset(offset: float, rows: int) -> None:
    if not offset:
        return
    torch.manual_seed(rows)
    gm = graph_of(Shifted(offset, weight="quantized"), X[:rows])
    rewrites(MoveZeroPoints, gm, X[:rows], rtol=1e-4, atol=1e-5 * (1 + abs(offset)))


class Image(nn.Module):
    """A convolution on `dequantize(quantize(x + offset)) - offset`, and perhaps another with the same padding."""

    def __init__(self, layer: Any, *, stored: bool = False, twice: bool = False, second: bool = False) -> None:
        super().__init__()
        self.layer, self.stored, self.second = layer.requires_grad_(False), stored, second
        self.other = nn.Conv2d(4, 2, 3, padding=1) if twice else None
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("codes", torch.ones(1, 4, 5, 5, dtype=torch.int8))

    def forward(self, x: Tensor) -> Any:
        codes = self.codes if self.stored else QUANTIZE(x + 0.7, self.scale, format="int8")
        shifted = DEQUANTIZE(codes, self.scale, format="int8", dtype=x.dtype) - 0.7
        weight = DEQUANTIZE(
            QUANTIZE(self.layer.weight, self.scale, format="int8"), self.scale, format="int8", dtype=x.dtype
        )
        given = weight, self.layer.bias, self.layer.stride, self.layer.padding
        if isinstance(self.layer, nn.ConvTranspose2d):
            return nn.functional.conv_transpose2d(shifted, *given)
        y = nn.functional.conv2d(shifted, *given, self.layer.dilation, self.layer.groups)
        if self.other is not None:
            return y, self.other(shifted)
        return (y, shifted) if self.second else y


IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def image(*args: Any, dynamic: Any = None, **options: Any) -> Any:
    gm = graph_of(Image(*args, **options), IMAGE, dynamic_shapes=dynamic)
    NormalizeConvolution()(gm)
    return gm


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), bias=False),
        lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=4),
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    ],
)
@pytest.mark.parametrize("dynamic", [None, ({0: DYNAMIC, 2: DYNAMIC},)])
def test_a_convolution_pads_codes_of_zero(layer: Any, dynamic: Any) -> None:
    gm = image(layer(), dynamic=dynamic)
    rewrites(MoveZeroPoints, gm, IMAGE, **CLOSE)
    convolution = only_call(gm, aten.convolution.default)
    assert convolution.args[0].target is DEQUANTIZE and not any(convolution.args[4])  # type: ignore[arg-type,union-attr]
    assert count(gm, aten.sub.Tensor) == 0 and count(gm, QUANTIZE) == 2


def test_convolutions_with_one_padding_share_what_is_padded() -> None:
    gm = image(nn.Conv2d(4, 6, 3, padding=1), twice=True)
    rewrites(MoveZeroPoints, gm, IMAGE, fired=2, **CLOSE)
    assert count(gm, aten.constant_pad_nd.default) == 1
    rewrites(MoveZeroPoints, image(nn.Conv2d(4, 6, 3, padding=1), second=True), IMAGE, **CLOSE)


def test_edges_of_a_transposed_convolution_and_codes_from_elsewhere() -> None:
    (reason,) = declines(MoveZeroPoints, image(nn.ConvTranspose2d(4, 6, 3)))
    assert "edge of a transposed" in reason
    (reason,) = declines(MoveZeroPoints, image(nn.Conv2d(4, 6, 3, padding=1), stored=True))
    assert "no quantizer of this graph" in reason
    rewrites(MoveZeroPoints, image(nn.Conv2d(4, 6, 3), stored=True), IMAGE, **CLOSE)
