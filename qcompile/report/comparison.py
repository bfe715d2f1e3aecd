"""A file against the program that it was made from, as reports have it; `qcompile.onnx.compare` makes it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Difference:
    """One tensor against its reference.

    max_abs, relative_l2 (norm of the difference over norm of the reference) and cosine are over the elements that are
    finite on both sides. Elements that are NaN or inf on one side only, or in another way, are in `nonfinite_unequal`.
    unequal: fraction of codes whose bits differ, for integers and FP8; None for other types.
    problem: why the two cannot be compared (then the numbers are inf and nan), or None.
    module: path of the module that makes the tensor, where that is known.
    """

    name: str
    elements: int
    max_abs: float
    relative_l2: float
    cosine: float
    unequal: float | None = None
    nonfinite_reference: int = 0
    nonfinite_candidate: int = 0
    nonfinite_unequal: int = 0
    problem: str | None = None
    module: str = ""

    @property
    def badness(self) -> float:
        """What `Comparison.worst` sorts by: inf for what cannot be compared or is not finite where it should be."""
        return math.inf if self.problem or self.nonfinite_unequal else self.relative_l2


@dataclass(frozen=True)
class Comparison:
    """Every tensor of the reference against the candidate's, in the reference's order."""

    differences: tuple[Difference, ...]

    def worst(self, n: int = 5) -> list[Difference]:
        """The `n` tensors furthest from the reference; ties stay in the reference's order."""
        return sorted(self.differences, key=lambda difference: -difference.badness)[:n]

    def __getitem__(self, name: str) -> Difference:
        return next(difference for difference in self.differences if difference.name == name)

    def to_json(self) -> list[dict[str, object]]:
        """Plain data for `json.dumps`; inf and nan, which JSON lacks, as strings."""
        return [{key: _plain(value) for key, value in asdict(d).items()} for d in self.differences]


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
