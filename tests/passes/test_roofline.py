"""When a convolution pays on codes: numbers worked out by hand, and what the layer lists say of whole networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.graph import aten
from passes.roofline import BALANCE, LEAST_GAIN, Roofline
from passes.testing import DYNAMIC, graph_of, only_call


def roofline(layer: nn.Module, *sizes: int, **options: object) -> Roofline:
    gm = graph_of(layer, torch.randn(*sizes), normalized=True, **options)  # type: ignore[arg-type]
    return Roofline.of(only_call(gm, aten.convolution.default))


def test_sizes_are_those_of_the_call() -> None:
    found = roofline(nn.Conv2d(8, 12, 3, padding=1, groups=4), 2, 8, 5, 7)
    assert found == Roofline(2 * 12 * 35 * 2 * 9, 2 * 8 * 35, 12 * 2 * 9, 2 * 12 * 35)
    again = roofline(nn.Conv2d(8, 12, 3, padding=1, groups=4), 2, 8, 5, 7, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC},))
    assert again == found  # at the sizes of the example


def test_the_formula() -> None:
    found = Roofline(products=64e6, input=1e5, weight=4e4, output=5e4)
    assert found.half == 2 * 64e6 / BALANCE and found.low(False) == 64e6 / BALANCE + 3e5
    assert found.low(True) == 1e5 + 4e4 + 2e5 + 3e5 + 2e5  # float32 between two kernels
    small = Roofline(products=1e6, input=1e5, weight=4e4, output=5e4)
    assert small.moved == 3.8e5 and small.moved_on_codes(False) == 2.4e5 + 3e5
    assert small.half == 3.8e5 and small.low(False) == 2.4e5 + 3e5 and small.gain(False) < 1


@pytest.mark.parametrize(
    ("layer", "channels", "pays"),
    [
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), 3, False),  # a stem
        (nn.Conv2d(96, 96, 7, padding=3, groups=96), 96, False),  # of ConvNeXt
        (nn.Conv2d(64, 64, 1), 64, False),
        (nn.Conv2d(256, 256, 3, padding=1), 256, True),  # of a UNet, a VAE, the end of a ResNet
        (nn.Conv2d(320, 320, 3, padding=1), 320, True),
    ],
)
def test_wide_kernels_of_many_channels_pay(layer: nn.Module, channels: int, pays: bool) -> None:
    assert (roofline(layer, 1, channels, 56, 56).gain(False) >= LEAST_GAIN) == pays
