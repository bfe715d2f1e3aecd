"""`awq`: the columns of weights that meet large activations are kept more exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from passes.absorb import find_absorber
from qcompile.algorithms.base import Operand, View
from qcompile.algorithms.channels import Sizes
from qcompile.algorithms.settings import AwqSettings
from qcompile.algorithms.smoothing import Group, Smoother, pieces
from qcompile.schemes.config import QuantizerConfig, format_of


class Awq(Smoother[AwqSettings]):
    """Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2024, equation 4.

    Where the exponent is searched, the factor is that over the size of the column to the power of 1 - alpha, as in the
    authors' code (`duo_scaling`); for an input in blocks exponents are told apart by the error of the weights alone, as
    they do.
    """

    model = AwqSettings

    def rounds_input(self, config: QuantizerConfig) -> bool:
        """Blocks measure their own scales, which follow a factor; the scale of a tensor or a token may not."""
        return not format_of(config).sizes

    def size(self, sizes: Sizes) -> torch.Tensor:
        return sizes.mean

    def columns(self, weights: Sequence[Operand]) -> torch.Tensor:
        """The mean over all rows of a magnitude as a part of the largest that it shares a scale with along the row."""
        rows = torch.cat([_relative(piece, weight) for weight in weights for piece in pieces(weight)])
        return rows.mean(0)

    def divisor(self, alpha: float, size: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        plain = size**alpha
        return plain if self.settings.alpha is not None else plain / columns ** (1 - alpha)

    def _groups(self, view: View) -> tuple[list[Group], dict[Node, str]]:
        groups, left = super()._groups(view)
        return [part for group in groups for part in (_parts(group) if self.settings.separate else [group])], left


def _relative(values: torch.Tensor, weight: Operand) -> torch.Tensor:
    """Magnitudes `[N, K]` as parts of the largest of their blocks along the row, or of the row."""
    width = weight.format.sizes[-1] if weight.format.sizes else values.shape[-1]
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[-1] % width))
    blocks = padded.reshape(len(values), -1, width)
    largest = blocks.amax(-1, keepdim=True)
    return (blocks / largest.where(largest > 0, 1)).reshape(padded.shape)[:, : values.shape[-1]]


def _parts(group: Group) -> list[Group]:
    """Each layer of a group for itself; those beside it, which are not quantized, stay as they are."""
    if len(group.weights) == 1:
        return [group]
    return [
        Group([weight], group.input, find_absorber(group.tensor, [weight.site.consumer])) for weight in group.weights
    ]
