"""What a step of calibration can say in a recipe.

The settings of an algorithm stand in its own file, which imports torch; only those of `max` are here, so that a recipe
without others is read without torch.
"""

from __future__ import annotations

from typing import Literal

from qcompile.schemes.strict import Strict


class Settings(Strict):
    """What every step of calibration can say. An algorithm names itself in `algorithm`, and adds its own."""

    algorithm: str
    """How scales are chosen."""
    power_of_two: bool = False
    """Round every constant scale up to a power of two: division by it is then exact, so that all runtimes make the same
    codes in any precision, at the price of up to one bit of range. Scales of blocks stay what their blocks measure."""


class MaxSettings(Settings):
    """`max`: the largest magnitude, of weights and of what calibration data shows."""

    algorithm: Literal["max"] = "max"
    """`max`: the largest magnitude seen in the calibration data."""
