"""`mse`: the scale whose codes come nearest to the numbers, by the mean of squared errors."""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import RANGES, WEIGHTS, Algorithm, Operand, Seen, View, quantizer, ranges
from qcompile.algorithms.scales import scale_of
from qcompile.algorithms.search import ScaleSearch, least
from qcompile.algorithms.settings import MseSettings
from qcompile.algorithms.statistics import Histogram, Largest, Statistic


class Mse(Algorithm[MseSettings]):
    """Searches weights by their numbers, and ranges in histograms.

    Activations in NVFP4 stay with `max`: the scales of their blocks follow the data anyhow.
    """

    model = MseSettings

    @property
    def chooses(self) -> frozenset[str]:
        return frozenset({WEIGHTS, RANGES} if self.settings.smallest_range < 1 else {WEIGHTS})

    def watch(self, view: View) -> dict[Node, Statistic]:
        return {operand.node: Histogram() for operand in self._clipped(view)}

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        part = view.of(self._clipped(view), view.quantizers)
        return ScaleSearch(self.settings).weights(view) | {
            operand: quantizer(operand, amax, self.settings.power_of_two)
            for operand, amax in ranges(part, seen, self._range).items()
        }

    def _clipped(self, view: View) -> list[Operand]:
        return [o for o in view.activations if o.format.scale is None and self.settings.smallest_range < 1]

    def _range(self, operand: Operand, seen: Largest) -> torch.Tensor:
        """The range of an activation, from the histogram of its magnitudes."""
        assert isinstance(seen, Histogram)
        own, largest = self.settings, seen.value
        if own.power_of_two:
            exponents = range(int(-torch.tensor(own.smallest_range).log2().floor()) + 1)
            base = scale_of(largest, operand.config, True) * operand.format.global_max
            tried = torch.stack([base * 2.0**-e for e in exponents if 2.0**-e >= own.smallest_range])
        else:
            # finer than for weights: a histogram is small
            factors = torch.logspace(0, 1, 4 * own.candidates + 1, own.smallest_range, dtype=torch.float64)
            tried = (largest.double() * factors).float()
            tried[0] = largest
        filled = seen.counts.nonzero().flatten()
        counts, centers = seen.counts[filled], (filled.double() + 0.5) * seen.width
        centers = centers.clamp(max=float(largest)).float()  # the last one: nothing is larger
        scales = torch.stack([scale_of(amax, operand.config, own.power_of_two) for amax in tried])
        rounded = operand.format.nearest(centers / scales[:, None]) * scales[:, None]
        errors = ((rounded - centers).double().square() * counts).sum(1)
        return tried[int(least(errors[:, None])[0])]
