"""Which token comes next: the likeliest one, or one drawn from the likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import GenerationError

__all__ = ["Sampling"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token, and nothing is drawn.
        top_k: only the k likeliest tokens; 0 for all of them.
        top_p: of these, the least number of the likeliest ones whose probabilities add up to this or more.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise GenerationError(f"a temperature of {self.temperature}: it is 0, for the likeliest token, or more")
        if self.top_k < 0:
            raise GenerationError(f"top_k of {self.top_k}: it is 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p of {self.top_p}: it is above 0, and at most 1")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise GenerationError("top_k and top_p choose what is drawn from: give a temperature above 0, too")

    def choose(self, logits: npt.NDArray[Any], random: np.random.Generator) -> npt.NDArray[np.int64]:
        """A token for each row of logits `[rows, vocabulary]`."""
        if not self.temperature:
            return np.asarray(logits.argmax(-1), np.int64)
        return np.array([random.choice(len(row), p=self.probabilities(row)) for row in logits], np.int64)

    def probabilities(self, logits: npt.NDArray[Any]) -> Floats:
        """Of each token, for one row of logits; 0 for those that are left out."""
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        chances = np.exp(scaled[order] - scaled[order[0]])
        chances /= chances.sum()
        kept = int(np.searchsorted(np.cumsum(chances), self.top_p - 1e-12)) + 1
        found = np.zeros(len(scaled))
        found[order[:kept]] = chances[:kept] / chances[:kept].sum()
        return found
