"""`awq`: the columns of weights that meet large activations are kept more exactly."""

from __future__ import annotations

from typing import Literal

import torch

from qcompile.algorithms.channels import Sizes
from qcompile.algorithms.settings import SmoothingSettings
from qcompile.algorithms.smoothing import Smoother


class AwqSettings(SmoothingSettings):
    """`awq`: columns of weights by how large the activations are that they meet."""

    algorithm: Literal["awq"]
    """`awq`: multiply each column of a linear layer's weight by the mean magnitude of its channel of the input, to the
    power of alpha, and divide the channel by it. Scales are left to the step behind it, or to `max`."""


class Awq(Smoother[AwqSettings]):
    """Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2024, equation 4.

    Where the exponent is searched, that over the column's largest magnitude to the power of 1 - alpha is tried, too, as
    the authors' code does (`duo_scaling`).
    """

    model = AwqSettings

    def size(self, sizes: Sizes) -> torch.Tensor:
        return sizes.mean

    def divisors(self, alpha: float, size: torch.Tensor, columns: torch.Tensor) -> list[torch.Tensor]:
        plain = size**alpha
        return [plain] if self.settings.alpha is not None else [plain, plain / columns ** (1 - alpha)]
