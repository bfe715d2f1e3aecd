"""How ranges of activations grew while calibration saw more samples: whether the data sufficed."""

from __future__ import annotations

from dataclasses import dataclass

LARGER = 1.05  # a range that grows by less moves a code of FP8 or INT8 by little
_SAME = 1.01


@dataclass(frozen=True)
class RangeStep:
    """What would be missing if calibration had ended after `samples`.

    Attributes:
        larger: ranges that all data made larger by more than 5 %, or that nothing had reached yet.
        factor: the most by which one was made larger, of those that something had reached. quantizer: which one.
    """

    samples: int
    larger: int
    factor: float
    quantizer: str


@dataclass(frozen=True)
class RangeGrowth:
    """The largest magnitudes of what has a constant scale, after more and more samples.

    Attributes:
        ranges: how many there are. samples: all that were seen.
        steps: at every doubling of the number of batches, and at half of them where their number was known.
    """

    ranges: int
    samples: int
    steps: tuple[RangeStep, ...]

    @property
    def half(self) -> RangeStep:
        """The step that is nearest to half of the samples."""
        return min(self.steps, key=lambda step: abs(2 * step.samples - self.samples))

    @property
    def suffices(self) -> bool:
        """Whether the second half made no range larger by more than 5 %."""
        return not self.half.larger

    def __str__(self) -> str:
        half = self.half
        rest = f"the last {self.samples - half.samples} of {self.samples} samples"
        if half.larger:
            most = f", most of all {half.quantizer} ({half.factor:.3g} x)" if half.factor > LARGER else ""
            return (
                f"{half.larger} of {self.ranges} ranges grew by more than {LARGER - 1:.0%} in {rest} of calibration"
                f"{most}: more data would help"
            )
        least = _SAME if half.factor <= _SAME else LARGER
        return f"{rest} of calibration changed no range by more than {least - 1:.0%}"
