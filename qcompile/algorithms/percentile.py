"""`percentile`: ranges of activations that leave out the largest few of what calibration shows."""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import RANGES, Algorithm, Operand, Seen, View, quantizer, ranges
from qcompile.algorithms.settings import PercentileSettings
from qcompile.algorithms.statistics import Histogram, Largest, Statistic


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
        if view.gm is not None and not part.operands:
            view.notices.append("percentile chose nothing: no activation here has a constant scale to be found")
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
