"""Watches ranges while batches come: how much each grew since a part of the data, and which batch spoiled it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.report.ranges import LARGER, RangeGrowth, RangeStep


class RangeLog:
    """The largest magnitudes after 1, 2, 4, 8 ... batches, and after half of them.

    That is a number for each range at a dozen moments, whatever the data is.
    """

    def __init__(self, statistics: Iterable[Statistic], total: int | None) -> None:
        """`total` is the number of batches, None where nobody knows."""
        self._all = list(dict.fromkeys(statistics))
        self._watched = [one for one in self._all if isinstance(one, Largest)]
        self._half = None if total is None else (total + 1) // 2
        self._seen: dict[int, dict[Largest, float]] = {}  # samples -> largest magnitudes
        self._samples = 0

    def add(self, batches: int, samples: int) -> list[Statistic]:
        """So many were seen by now. Returns what the last one brought NaN or infinity to."""
        self._samples = samples
        if batches & (batches - 1) == 0 or batches == self._half:
            self._seen[samples] = {statistic: float(statistic.value) for statistic in self._watched}
        return [one for one in self._all if not one.lost and one.spoiled]

    def growth(self, names: Mapping[Largest, str]) -> RangeGrowth | None:
        """Of the ranges in `names`, which has their quantizers; None if there is nothing to compare."""
        watched = set(self._watched)
        final = {one: float(one.value) for one in names if one in watched and float(one.value)}
        steps = [
            _step(samples, seen, final, names) for samples, seen in self._seen.items() if 0 < samples < self._samples
        ]
        return RangeGrowth(len(final), self._samples, tuple(steps)) if final and steps else None


def _step(
    samples: int, seen: Mapping[Largest, float], final: Mapping[Largest, float], names: Mapping[Largest, str]
) -> RangeStep:
    factors = {one: value / seen[one] for one, value in final.items() if seen[one]}
    unreached = len(final) - len(factors)
    larger = unreached + sum(factor > LARGER for factor in factors.values())
    most = max(factors, key=lambda one: factors[one], default=None)
    return RangeStep(samples, larger, factors[most] if most else 1.0, names[most] if most else "")
