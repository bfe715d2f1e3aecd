"""Convolutions that cut an image into patches, and those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.normalize.convolution import NormalizeConvolution
from passes.normalize.patch_embedding import PatchEmbeddingToLinear
from passes.normalize.views import ViewsToReshape
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LARGE = (4, 12)  # more than 32 pixels


class Patches(nn.Module):
    """[B,3,H,W] -> [B,L,N], as vision transformers write it."""

    def __init__(self, kernel: Any = 4, **options: Any) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 10, kernel, **{"stride": kernel, **options})

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


class Both(Patches):
    """The tokens, and the image that they were before."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.projection(x)
        return y.flatten(2).transpose(1, 2), y.sin()


class Permuted(Patches):
    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).permute(0, 2, 1)


class Joined(Patches):
    """Joins the batch with the patches: three axes, but not those of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).reshape(1, 10, -1).transpose(1, 2)


def captured(module: nn.Module, x: Tensor, **options: Any) -> GraphModule:
    gm = graph_of(module, x, **options)
    ViewsToReshape()(gm)
    NormalizeConvolution()(gm)
    return gm


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    "module",
    [Patches(), Patches((2, 4)), Patches(bias=False), Patches(padding="valid"), Permuted()],
    ids=["square", "oblong", "without bias", "valid", "permute"],
)
def test_the_tokens_come_straight_from_one_linear_layer(module: nn.Module) -> None:
    gm = captured(module, torch.randn(2, 3, 8, 12))
    rewrites(PatchEmbeddingToLinear, gm, torch.randn(2, 3, 8, 12), **TOLERANCE)
    assert (count(gm, aten.convolution.default), count(gm, aten.linear.default)) == (0, 1)
    assert (count(gm, aten.transpose.int), count(gm, aten.permute.default)) == (0, 1)


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    "module", [Both(), Patches(LARGE).projection, Joined(LARGE)], ids=["both", "image only", "joined"]
)
def test_other_users_get_the_image_back(module: nn.Module) -> None:
    gm = captured(module, torch.randn(2, 3, 8, 12))
    rewrites(PatchEmbeddingToLinear, gm, torch.randn(2, 3, 8, 12), **TOLERANCE)
    assert (count(gm, aten.convolution.default), count(gm, aten.linear.default)) == (0, 1)


def test_the_batch_may_be_dynamic() -> None:
    gm = captured(Patches(), torch.randn(2, 3, 8, 8), dynamic_shapes=({0: DYNAMIC},))
    rewrites(PatchEmbeddingToLinear, gm, torch.randn(5, 3, 8, 8), **TOLERANCE)


def test_a_dynamic_image_is_declined() -> None:
    gm = captured(Patches(8).projection, torch.randn(2, 3, 8, 8), dynamic_shapes=({2: DYNAMIC, 3: DYNAMIC},))
    (reason,) = declines(PatchEmbeddingToLinear, gm)
    assert "dynamic" in reason


def test_an_image_of_part_patches_is_declined() -> None:
    (reason,) = declines(PatchEmbeddingToLinear, captured(Patches(), torch.randn(2, 3, 9, 8)))
    assert "9x8 is not a whole number of 4x4 patches" in reason


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (Patches(stride=2), 3),
        (Patches(padding=2), 3),
        (Patches(2, dilation=2), 3),
        (nn.Conv2d(4, 8, 2, 2, groups=2), 4),
        (nn.Conv2d(3, 8, 3, padding="same"), 3),
        (Patches(4).projection, 3),
        (Joined(4), 3),
    ],
    ids=["overlap", "padding", "dilation", "groups", "same", "small, an image", "small, joined"],
)
def test_other_convolutions_are_none_of_its_business(module: nn.Module, channels: int) -> None:
    gm = captured(module, torch.randn(2, channels, 8, 8))
    assert declines(PatchEmbeddingToLinear, gm) == []
    assert count(gm, aten.convolution.default) == 1


def test_an_image_without_a_batch_stays() -> None:
    assert declines(PatchEmbeddingToLinear, captured(Patches().projection, torch.randn(3, 8, 8))) == []


def test_a_convolution_with_a_computed_weight_stays() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.conv2d(x, w, stride=4)

    assert (
        declines(PatchEmbeddingToLinear, captured(Computed(), torch.randn(2, 3, 8, 8), w=torch.randn(5, 3, 4, 4))) == []
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantizers_of_another_tool_move_with_what_they_quantize(per_channel: bool) -> None:
    class Quantized(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x_scale", torch.tensor(0.01))
            amax = self.projection.weight.detach().abs().amax((1, 2, 3), keepdim=True)
            self.register_buffer("w_scale", amax / 448 if per_channel else amax.max() / 448)

        def forward(self, x: Tensor) -> Tensor:
            def pair(y: Tensor, scale: Any) -> Tensor:
                result: Tensor = DEQUANTIZE(QUANTIZE(y, scale, format="fp8"), scale, format="fp8", dtype=y.dtype)
                return result

            weight = pair(self.projection.weight, self.w_scale)
            y = nn.functional.conv2d(pair(x, self.x_scale), weight, self.projection.bias, 4)
            return y.flatten(2).transpose(1, 2)

    gm = captured(Quantized(), torch.randn(2, 3, 8, 12))
    rewrites(PatchEmbeddingToLinear, gm, torch.randn(2, 3, 8, 12), **TOLERANCE)
    linear = only_call(gm, aten.linear.default)
    assert all(operand.target is DEQUANTIZE for operand in linear.args[:2])
