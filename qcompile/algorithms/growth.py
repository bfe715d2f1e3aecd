"""Watches ranges while batches come: how much each grew since a part of the data, and which batch spoiled it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.report.ranges import LARGER, RangeGrowth, RangeStep

Facts = tuple[int, dict[int, tuple[int, list[float]]], list[float]]
"""Samples in all, moment -> samples and ranges until then, and the last ranges."""


class RangeLog:
    """The largest magnitudes after 1, 2, 4, 8 ... batches, and after half of them.

    That is a number for each range at a dozen moments, whatever the data is.
    """

    def __init__(self, statistics: Iterable[Statistic], total: int | None, stride: int = 1) -> None:
        """`total` is the number of batches, None where nobody knows; `stride`: every how many of them one is
        seen here."""
        self._all = list(dict.fromkeys(statistics))
        self._watched = [one for one in self._all if isinstance(one, Largest)]
        self._half = None if total is None else (total + 1) // 2
        self._stride = stride
        self._seen: dict[int, tuple[int, dict[Largest, float]]] = {}  # batches -> samples, largest magnitudes
        self._samples = 0

    def add(self, batches: int, samples: int) -> list[Statistic]:
        """So many of all batches were there by now, and so many samples seen. Returns what the last one brought NaN or
        infinity to."""
        self._samples = samples
        for moment in range(batches, batches + self._stride):  # what comes until the next one is not seen here
            if moment & (moment - 1) == 0 or moment == self._half:
                self._seen[moment] = samples, {one: float(one.value) for one in self._watched}
        return [one for one in self._all if not one.lost and one.spoiled]

    def end(self) -> None:
        """No batch comes any more: what is no range, and may be large, is let go."""
        self._all.clear()

    def facts(self) -> Facts:
        """What `join` has to know of each process."""
        seen = {moment: (samples, [*values.values()]) for moment, (samples, values) in self._seen.items()}
        return self._samples, seen, [float(one.value) for one in self._watched]

    def join(self, facts: Sequence[Facts], batches: int) -> None:
        """Know what one process would know that had seen what each of several did, of `batches` in all."""
        self._samples = sum(samples for samples, _, _ in facts)
        moments = sorted({moment for _, seen, _ in facts for moment in seen if moment <= batches})
        self._seen = {}
        for moment in moments:
            at = [_at(moment, *own) for own in facts]
            largest = [max(values) for values in zip(*(values for _, values in at), strict=True)]
            self._seen[moment] = sum(samples for samples, _ in at), dict(zip(self._watched, largest, strict=True))

    def growth(self, names: Mapping[Largest, str]) -> RangeGrowth | None:
        """Of the ranges in `names`, which has their quantizers; None if there is nothing to compare."""
        watched = set(self._watched)
        final = {one: float(one.value) for one in names if one in watched and float(one.value)}
        steps = [
            _step(samples, seen, final, names) for samples, seen in self._seen.values() if 0 < samples < self._samples
        ]
        return RangeGrowth(len(final), self._samples, tuple(steps)) if final and steps else None


def _at(
    moment: int, samples: int, seen: Mapping[int, tuple[int, list[float]]], final: list[float]
) -> tuple[int, list[float]]:
    """How many samples one of several processes had seen at a moment, and the ranges that it knew."""
    if moment in seen:
        return seen[moment]
    return (samples, final) if any(moment > known for known in seen) else (0, [0.0] * len(final))


def _step(
    samples: int, seen: Mapping[Largest, float], final: Mapping[Largest, float], names: Mapping[Largest, str]
) -> RangeStep:
    factors = {one: value / seen[one] for one, value in final.items() if seen[one]}
    unreached = len(final) - len(factors)
    larger = unreached + sum(factor > LARGER for factor in factors.values())
    most = max(factors, key=lambda one: factors[one], default=None)
    return RangeStep(samples, larger, factors[most] if most else 1.0, names[most] if most else "")
