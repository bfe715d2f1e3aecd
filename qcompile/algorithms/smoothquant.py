"""`smoothquant`: large channels of activations are made smaller, and the weights that they meet larger."""

from __future__ import annotations

import torch

from qcompile.algorithms.channels import Sizes
from qcompile.algorithms.settings import SmoothQuantSettings
from qcompile.algorithms.smoothing import Smoother


class SmoothQuant(Smoother[SmoothQuantSettings]):
    """Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, 2023,
    equation 4; the exponent is searched, as the best one differs from layer to layer."""

    model = SmoothQuantSettings

    def size(self, sizes: Sizes) -> torch.Tensor:
        return sizes.largest

    def divisor(self, alpha: float, size: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return size**alpha / columns ** (1 - alpha)
