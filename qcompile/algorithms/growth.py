"""Watches ranges while batches come: how much each grew since a part of the data, and which batch spoiled it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qcompile.algorithms.share import WHOLE, Share
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.report.ranges import LARGER, RangeGrowth, RangeStep


class RangeLog:
    """The largest magnitudes after 1, 2, 4, 8 ... batches, and after half of them.

    That is a number for each range at a dozen moments, whatever the data is.
    """

    def __init__(self, statistics: Iterable[Statistic], total: int | None, share: Share = WHOLE) -> None:
        """`total` is the number of batches, None where nobody knows; `share`: those that are seen here."""
        self._watched = list(dict.fromkeys(one for one in statistics if isinstance(one, Largest)))
        self._half = None if total is None else (total + 1) // 2
        self._share = share
        self._seen: dict[int, tuple[int, dict[Largest, float]]] = {}  # batches -> samples, largest magnitudes
        self._samples = 0

    def add(self, batches: int, samples: int) -> list[Largest]:
        """So many of all batches were there by now, and so many samples seen. Returns the ranges that the last one made
        NaN or infinite."""
        self._samples = samples
        for moment in range(batches, batches + self._share.count):  # what comes until the next one is not seen here
            if moment & (moment - 1) == 0 or moment == self._half:
                self._seen[moment] = samples, {one: float(one.value) for one in self._watched}
        return [one for one in self._watched if not one.lost and not math.isfinite(float(one.value))]

    def growth(self, names: Mapping[Largest, str]) -> RangeGrowth | None:
        """Of the ranges in `names`, which has their quantizers; None if there is nothing to compare."""
        watched = set(self._watched)
        final = {one: float(one.value) for one in names if one in watched and float(one.value)}
        steps = [
            _step(samples, seen, final, names) for samples, seen in self._seen.values() if 0 < samples < self._samples
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
