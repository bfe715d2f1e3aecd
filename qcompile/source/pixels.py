"""Images as tensors where no directory says how: resized, from 0 to 1, less a mean, by a deviation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qcompile.errors import CalibrationError
from qcompile.source.preparation import Preparation

PIXELS = "pixel_values"  # what image processors call it
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Pixels:
    """In the place of an image processor, and called as one.

    Images become as large as they have to be whatever their shape, by linear interpolation, as ViT's processor does it.
    """

    def __init__(self, how: Preparation, channels: int = 3) -> None:
        self.how, self.channels = how, channels

    def of(self, example: torch.Tensor) -> Pixels:
        """The same, for an input `[batch, channels, height, width]`, with its size if none is given."""
        height, width = example.shape[2:]
        size = self.how.image_size or (int(height), int(width))
        channels = int(example.shape[1])
        if channels not in (1, 3):
            raise CalibrationError(
                f"the model takes {channels} channels, and images have 3, or 1 in gray: give tensors"
            )
        for numbers in (self.how.image_mean, self.how.image_std):
            if numbers is not None and len(numbers) not in (1, channels):
                raise CalibrationError(
                    f"{len(numbers)} numbers of mean or std, and the model takes {channels} channels"
                )
        return Pixels(dataclasses.replace(self.how, image_size=size), channels)

    def notices(self, name: str) -> list[str]:
        """What was not said."""
        lacking = [n for n, given in (("mean", self.how.image_mean), ("std", self.how.image_std)) if given is None]
        return [f"{name}: the {' and '.join(lacking)} of ImageNet, as none is given"] if lacking else []

    def __call__(self, images: Sequence[Any], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        from PIL import Image

        assert self.how.image_size is not None
        height, width = self.how.image_size
        mode = "L" if self.channels == 1 else "RGB"
        resized = [image.convert(mode).resize((width, height), Image.Resampling.BILINEAR) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image).reshape(height, width, -1) for image in resized]))
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        return {
            PIXELS: (scaled - self._channels(self.how.image_mean, _MEAN)) / self._channels(self.how.image_std, _STD)
        }

    def _channels(self, numbers: Sequence[float] | None, default: Sequence[float]) -> torch.Tensor:
        """`[C, 1, 1]`; gray has the mean of what colors have."""
        found = torch.tensor(default if numbers is None else numbers, dtype=torch.float32)
        if len(found) != self.channels:
            found = found.mean() if numbers is None else found
            found = found.expand(self.channels)
        return found[:, None, None]


def pixel_input(wanted: Mapping[str, torch.Tensor], model: str) -> tuple[str, torch.Tensor]:
    """The input that is images."""
    found = [(name, value) for name, value in wanted.items() if value.ndim == 4 and value.is_floating_point()]
    if len(found) != 1:
        raise CalibrationError(
            f"{model} takes {', '.join(wanted)}, of which {len(found)} can be images, [batch, channels, height, width]"
        )
    return found[0]
