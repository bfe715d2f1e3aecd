"""How near one tensor came to the end of the compute dtype, as `qcompile.quantization.headroom` sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headroom:
    """The largest magnitude that calibration saw of one tensor.

    Attributes:
        module: path of the module that makes it, empty at the root. tensor: name of its node in the program's graph.
        amax: the magnitude. factor: how much larger the largest number of the compute dtype is.
    """

    module: str
    tensor: str
    amax: float
    factor: float

    def __str__(self) -> str:
        return f"{self.module or self.tensor} ({self.amax:.3g})"
