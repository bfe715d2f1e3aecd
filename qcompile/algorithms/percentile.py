"""`percentile`: ranges of activations that leave out the largest few of what calibration shows."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.fx import Node

from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import RANGES, Algorithm, Operand, Seen, View, quantizer, ranges
from qcompile.algorithms.settings import Settings
from qcompile.algorithms.statistics import Histogram, Largest, Statistic


class PercentileSettings(Settings):
    """`percentile`: ranges of activations without the largest few numbers."""

    algorithm: Literal["percentile"]
    """`percentile`: the range of an activation with a constant scale ends where so many percent of the magnitudes that
    calibration shows are below; the rest saturates. Weights are left to other steps. Where outliers carry meaning, as
    in transformers, it is worse than `max`: measure."""
    percentile: Annotated[float, Field(gt=50, le=100, allow_inf_nan=False, strict=False)] = 99.99
    """How many percent."""


class Percentile(Algorithm[PercentileSettings]):
    """Reads histograms of magnitudes. Activations in NVFP4 stay with `max`: their blocks follow the data anyhow."""

    model = PercentileSettings

    @property
    def chooses(self) -> frozenset[str]:
        return frozenset({RANGES})

    def watch(self, view: View) -> dict[Node, Statistic]:
        return {operand.node: Histogram() for operand in self._clipped(view)}

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        part = view.of(self._clipped(view), view.quantizers)
        return {
            operand: quantizer(operand, amax, self.settings.power_of_two)
            for operand, amax in ranges(part, seen, self._range).items()
        }

    def _clipped(self, view: View) -> list[Operand]:
        return [operand for operand in view.activations if operand.format.scale is None]

    def _range(self, operand: Operand, seen: Largest) -> torch.Tensor:
        assert isinstance(seen, Histogram)
        below = seen.counts.cumsum(0)
        wanted = below[-1] * self.settings.percentile / 100
        last = int((below >= wanted).int().argmax())  # the range ends with the bin that has it
        return torch.minimum(seen.value, torch.tensor((last + 1) * seen.width, dtype=torch.float32))
