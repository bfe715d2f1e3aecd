"""`max`: the largest magnitude is the largest number of the format, so that nothing saturates."""

from __future__ import annotations

from torch.fx import Node

from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import RANGES, WEIGHTS, Algorithm, Operand, Seen, View, quantizer, ranges
from qcompile.algorithms.settings import MaxSettings
from qcompile.algorithms.statistics import Largest, Statistic


class Max(Algorithm[MaxSettings]):
    """Watches the largest magnitude of activations; weights are read."""

    model = MaxSettings

    @property
    def chooses(self) -> frozenset[str]:
        return frozenset({WEIGHTS, RANGES})

    def watch(self, view: View) -> dict[Node, Statistic]:
        return {operand.node: Largest() for operand in view.activations}

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        weights = {operand: view.amax(operand) for operand in view.weights}
        power_of_two = self.settings.power_of_two
        return {
            operand: quantizer(operand, amax, power_of_two) for operand, amax in (weights | ranges(view, seen)).items()
        }
