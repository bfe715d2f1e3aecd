"""What is kept of one tensor over all calibration batches."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.fx import Node

from passes.ir import repeat_kv
from passes.sdpa import HIDDEN, fully_masked
from qcompile.errors import AlgorithmError


class Statistic(ABC):
    """A running summary of what a node makes. Parts of the data can be seen by several of them, which then merge.

    Attributes:
        additive: whether a sample that is seen twice counts twice, as in sums and histograms. Then pieces of batches
            come with a weight, and are cut so that all of their samples have the same.
        lost: the first batch after which it was `spoiled`, in words; empty if there was none.
    """

    additive: ClassVar[bool] = False
    lost: str = ""

    def memory(self, node: Node) -> int:
        """The bytes that it will take of the results of `node`, as far as they depend on its size; known before data
        comes."""
        return 0

    @property
    def spoiled(self) -> bool:
        """Whether a NaN or an infinity came."""
        return False

    @property
    def first_lost(self) -> str:
        """`lost` for the end of a message."""
        return f", first in {self.lost}" if self.lost else ""

    @abstractmethod
    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        """Add one run.

        Args:
            result: what the node made. args: its arguments, as they were used.
            weight: what each sample in it counts: 1/n if the run holds every sample n times.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what `other` has seen, as if this one had seen it."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is known, for files and for other machines."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Know what `tensors` of another one said, and nothing else. Attributes are set anew, not changed in place."""
        kind = type(self).__name__
        raise AlgorithmError(
            f"{kind} has no `load`, which statistics of several processes need: the way back of `tensors`"
        )


class Largest(Statistic):
    """Largest magnitude.

    Attributes:
        value: over all elements, a float32 scalar; NaN or infinity if one of them is. finite: over those that are
            finite. reached: whether there was an element at all.
    """

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.float32)
        self.finite = 0.0
        self.reached = False

    @property
    def spoiled(self) -> bool:
        return not bool(self.value.isfinite())

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        if not result.numel():
            return
        self.reached = True
        self.add(self.magnitude(result.detach()))

    def add(self, largest: torch.Tensor) -> None:
        largest = largest.float().cpu()
        self.value = torch.maximum(self.value, largest)  # which carries a NaN on
        if bool(torch.isfinite(largest)):
            self.finite = max(self.finite, float(largest))

    def merge(self, other: Self) -> None:
        self.value = torch.maximum(self.value, other.value)
        self.finite = max(self.finite, other.finite)
        self.reached = self.reached or other.reached
        self.lost = min(filter(None, (self.lost, other.lost)), key=_numbered, default="")

    def tensors(self) -> dict[str, torch.Tensor]:
        numbers = {"finite": torch.tensor(self.finite, dtype=torch.float64), "reached": torch.tensor(self.reached)}
        return {"value": self.value, **numbers, "lost": torch.tensor(list(self.lost.encode()), dtype=torch.uint8)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.value, self.finite = tensors["value"].float().cpu(), float(tensors["finite"])
        self.reached = bool(tensors["reached"])
        self.lost = bytes(tensors["lost"].tolist()).decode(errors="replace")

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(x)
        largest = torch.maximum(-low, high)
        if not bool(torch.isfinite(largest)):
            self.finite = max(self.finite, float(torch.where(x.isfinite(), x, 0).abs().max()))
        return largest


class LargestBeforeSoftmax(Largest):
    """Largest magnitude, not counting what a mask made so negative that its probability is zero.

    A number below `-limit` becomes an infinity, which hides as well, but where a whole row is below it.
    """

    def __init__(self, axis: int | None, limit: float) -> None:
        """`axis` is that of the softmax, None where something stands in between."""
        super().__init__()
        self.axis, self.limit = axis, limit

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(x)
        if not bool(low < HIDDEN):
            return super().magnitude(x)
        rows = x.amax(self.axis) if self.axis is not None else high
        lost = rows[rows.isfinite() & (rows < -self.limit)]
        return -lost.min() if lost.numel() else high.clamp(min=0)


class LargestScore(Largest):
    """Largest magnitude of the scores that an attention has before its mask and softmax.

    They are computed if the longest query times the longest key could reach `limit` in some head; else nothing is kept.
    """

    def __init__(self, scale: float, limit: float) -> None:
        super().__init__()
        self.scale, self.limit = scale, limit

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        q, k = args[0].detach().float(), args[1].detach().float()
        if not q.numel() or not k.numel():
            return
        k = repeat_kv(k, q.shape[1]) if q.ndim == 4 else k
        bound = q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1) * self.scale
        if bool(bound.max() < self.limit):
            return
        self.reached = True
        found = 0.0
        for place in bound.flatten().argsort(descending=True):  # a head at a time: all scores at once take memory
            index = torch.unravel_index(place, bound.shape)
            if float(bound[index]) < found:
                break  # no head that is left has a larger one
            largest = self.magnitude(q[index] @ k[index].transpose(-1, -2) * self.scale)
            found = max(found, float(largest))
            self.add(largest)


class FullyMasked(Statistic):
    """Whether the mask of an attention hid every key from some query.

    Attributes:
        found: whether it did.
    """

    def __init__(self) -> None:
        self.found = False

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        self.found = self.found or (result.numel() > 0 and bool(fully_masked(result).any()))

    def merge(self, other: Self) -> None:
        self.found = self.found or other.found

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"found": torch.tensor(self.found)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.found = bool(tensors["found"])


class Histogram(Largest):
    """How often which magnitude was met, and the largest.

    Bins divide the range from zero to a power of two, which doubles when something larger comes: two bins become one
    then, so that counts do not depend on the order of the data, and those of two machines add up exactly.

    Attributes:
        counts: of the finite numbers, in float64.
        exponent: the last bin ends below 2 to the power of it.
    """

    additive = True
    BINS: ClassVar[int] = 2048
    LEAST: ClassVar[int] = -100  # below it numbers share bins: their quotients would leave float32

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.exponent = self.LEAST

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        super().update(result, args, weight)
        size = result.detach().abs().float().flatten()
        if not bool(torch.isfinite(self.value)):
            size = size[size.isfinite()]
        if size.numel():
            self._widen(_exponent(float(size.max())))
            bins = size.mul_(self.width**-1).int()  # exact, as the width is a power of two
            self.counts += counted(torch.bincount(bins, minlength=self.BINS).cpu().double(), weight)

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent / self.BINS

    def _widen(self, exponent: int) -> None:
        while self.exponent < exponent:
            halves = self.counts.view(-1, 2).sum(1)
            if not bool(halves.any()):  # nothing yet
                self.exponent = exponent
                return
            self.counts = torch.cat([halves, torch.zeros_like(halves)])
            self.exponent += 1

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._widen(other.exponent)
        counts, exponent = other.counts, other.exponent
        while exponent < self.exponent and bool(counts.any()):
            halves = counts.view(-1, 2).sum(1)
            counts, exponent = torch.cat([halves, torch.zeros_like(halves)]), exponent + 1
        self.counts = self.counts + counts

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**super().tensors(), "counts": self.counts, "exponent": torch.tensor(self.exponent)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().load(tensors)
        self.counts, self.exponent = tensors["counts"], int(tensors["exponent"])


def counted(numbers: torch.Tensor, weight: float) -> torch.Tensor:
    """Integers in float64 times a weight of 1/n. Of n times each sample that is an integer again, up to the rounding of
    the weight (49 / 49 is not 1), which is put right: sums of integers are the same in any order."""
    weighted = numbers if weight == 1 else numbers * weight
    whole = weighted.round()
    return torch.where((weighted - whole).abs() < 1e-9, whole, weighted)


def _numbered(batch: str) -> tuple[int, str]:
    """The order of `calibration batch 2` and `calibration batch 10 (photos/a.png)`."""
    found = re.search(r"\d+", batch)
    return int(found[0]) if found else 0, batch


def _exponent(largest: float) -> int:
    """The least power of two above a number."""
    return max(Histogram.LEAST, math.frexp(largest)[1]) if largest else Histogram.LEAST
