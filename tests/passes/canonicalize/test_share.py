"""Layers that quantize one tensor in the same way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.canonicalize.share import ShareQuantizers
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites


class Static(nn.Module):
    """A linear layer with a quantizer of its own for its input."""

    def __init__(self, scale: float, format: str = "fp8") -> None:
        super().__init__()
        self.linear, self.format = nn.Linear(32, 4), format
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        codes = QUANTIZE(x, self.scale, format=self.format)
        return self.linear(DEQUANTIZE(codes, self.scale, format=self.format, dtype=x.dtype))


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = DYNAMIC_QUANTIZE(x, None, format="fp8_per_token")
        return self.linear(DEQUANTIZE(codes, scale, format="fp8_per_token", dtype=x.dtype))


class TwoLevels(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 4)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        codes, blocks = DYNAMIC_QUANTIZE(x, self.scale, format="nvfp4")
        scale = DEQUANTIZE(blocks, self.scale, format="fp8", dtype=torch.float32)
        return self.linear(DEQUANTIZE(codes, scale, format="nvfp4", dtype=x.dtype))


class Beside(nn.Module):
    """Layers that all read `x * 2`, which is returned, too."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return (y, *(layer(y) for layer in self.layers))


X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("layers", "fired", "left"),
    [
        ([Static(0.5), Static(0.5), Static(0.5)], 4, {QUANTIZE: 1, DEQUANTIZE: 1}),
        ([PerToken(), PerToken()], 4, {DYNAMIC_QUANTIZE: 1, DEQUANTIZE: 1}),
        ([TwoLevels(0.01), TwoLevels(0.01)], 5, {DYNAMIC_QUANTIZE: 1, DEQUANTIZE: 2}),
        ([Static(0.5), Static(0.5), Static(0.25)], 2, {QUANTIZE: 2, DEQUANTIZE: 2}),
    ],
)
def test_equal_quantizers_become_one(layers: list[nn.Module], fired: int, left: dict[object, int]) -> None:
    for dynamic in (None, {"x": {0: DYNAMIC}}):
        gm = graph_of(Beside(*layers), X, dynamic_shapes=dynamic)
        rewrites(ShareQuantizers, gm, X, fired=fired)
        assert {target: count(gm, target) for target in left} == left


def test_quantizers_that_measure_the_same_become_one() -> None:
    class Measured(nn.Module):
        """A scale of its own, from magnitudes of its own."""

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().amax() / 448
            return DEQUANTIZE(QUANTIZE(x, scale, format="fp8"), scale, format="fp8", dtype=x.dtype)

    gm = graph_of(Beside(Measured(), Measured()), X)
    rewrites(ShareQuantizers, gm, X, fired=2)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1)


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    "layers",
    [
        [Static(0.5), Static(0.25)],
        [Static(0.5), Static(0.5, "int8")],
        [TwoLevels(0.01), TwoLevels(0.02)],
        [PerToken(), Static(0.5)],
    ],
)
def test_what_differs_stays_apart(layers: list[nn.Module]) -> None:
    assert declines(ShareQuantizers, graph_of(Beside(*layers), X)) == []


def test_other_tensors_keep_their_quantizers() -> None:
    gm = graph_of(nn.Sequential(Static(0.5), nn.Linear(4, 32), Static(0.5)), X)
    assert declines(ShareQuantizers, gm) == []


def test_weights_of_one_scale_stay_apart() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
            self.register_buffer("a", codes)
            self.register_buffer("b", codes.clone())
            self.register_buffer("s", torch.tensor(0.5))
            self.register_buffer("t", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            a = DEQUANTIZE(self.a, self.s, format="fp8", dtype=x.dtype)
            return x @ a.t() + x @ DEQUANTIZE(self.b, self.t, format="fp8", dtype=x.dtype).t()

    assert declines(ShareQuantizers, graph_of(Weights(), torch.ones(1, 2))) == []
