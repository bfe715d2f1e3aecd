"""What inputs of a layer have to do with each other: the sum of x x^T over all tokens, or blocks on its diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.fx import Node

from passes.graph import shape
from qcompile.algorithms.statistics import Statistic, counted


class ExactSum:
    """A sum of tensors of one shape that is the same in any order, and whoever added which of them.

    Each is cut, toward zero, into two integers in units of powers of 2^32: the unit of the larger ones is that below
    the largest number of all. Sums of such integers are exact in float64, for 2^21 tensors. A larger number that comes
    later shifts both by a whole unit, so that what is dropped is what would have been dropped from the start. What is
    lost is below 2^-32 of the largest number.

    Attributes:
        high, low: the two sums; None as long as nothing but zeros was added. place: of the unit of `high`.
    """

    BITS: ClassVar[int] = 32

    def __init__(self) -> None:
        self.high: torch.Tensor | None = None
        self.low: torch.Tensor | None = None
        self.place = 0

    def add(self, part: torch.Tensor) -> None:
        """Add finite numbers in float64, whose memory is used up."""
        least, most = torch.aminmax(part) if part.numel() else (torch.zeros(()), torch.zeros(()))
        largest = max(-float(least), float(most))
        if not largest:
            return
        place = max(-30, -(-math.frexp(largest)[1] // self.BITS) - 1)  # 2^-960: what is less would leave float64
        own = max(place, self.place) if self.high is not None else place
        scaled = part.mul_(2.0 ** (-own * self.BITS))
        high = scaled.trunc()
        self._sum(own, high, scaled.sub_(high).mul_(2.0**self.BITS).trunc_())

    def merge(self, other: ExactSum) -> None:
        if other.high is not None and other.low is not None:
            own = max(self.place, other.place) if self.high is not None else other.place
            self._sum(own, *(half.clone() for half in _shifted(other.high, other.low, own - other.place)))

    def _sum(self, place: int, high: torch.Tensor, low: torch.Tensor) -> None:
        if self.high is None or self.low is None:
            self.high, self.low = high, low
        else:
            self.high, self.low = _shifted(self.high, self.low, place - self.place)
            self.high.add_(high)
            self.low.add_(low)
        self.place = place

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is known."""
        nothing = torch.zeros(0, dtype=torch.float64)
        high, low = (nothing if half is None else half for half in (self.high, self.low))
        return {"high": high, "low": low, "place": torch.tensor(self.place)}

    @classmethod
    def loaded(cls, tensors: Mapping[str, torch.Tensor]) -> ExactSum:
        """The way back of `tensors`."""
        found = cls()
        if tensors["high"].numel():
            found.high, found.low, found.place = tensors["high"], tensors["low"], int(tensors["place"])
        return found

    def total(self) -> torch.Tensor | None:
        """In float64; None for nothing but zeros."""
        if self.high is None or self.low is None:
            return None
        return self.low.mul(2.0**-self.BITS).add_(self.high).mul_(2.0 ** (self.place * self.BITS))


def _shifted(high: torch.Tensor, low: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sums in larger units."""
    if by == 0:
        return high, low
    return torch.zeros_like(high), high if by == 1 else torch.zeros_like(low)


class SecondMoment(Statistic):
    """The sum of x x^T over the tokens of a tensor, or the blocks of it that lie on its diagonal.

    Attributes:
        width: of a block; None for one that is all. grouped: the first axis of the tensor numbers experts, each of
            which has a sum of its own.
        tokens: how many were seen, `[1]`, or of each expert `[E]`; rows of zeros are none.
        runs: how many brought something. broken: those with a NaN or an infinity, which are left out.
    """

    additive = True

    def __init__(self, width: int | None = None, *, grouped: bool = False, double: bool = False) -> None:
        """`double`: products in float64, too; sums always are."""
        self.width, self.grouped, self.double = width, grouped, double
        self.sum = ExactSum()
        self.tokens = torch.zeros(1, dtype=torch.float64)
        self.runs = self.broken = 0

    def memory(self, node: Node) -> int:
        sizes = shape(node)
        return self._bytes(sizes[0] if self.grouped else 1, sizes[-1])

    def _bytes(self, experts: int, columns: int) -> int:
        """Two sums in float64."""
        width = columns if self.width is None else self.width
        return int(16 * experts * -(-columns // width) * width**2)

    @property
    def spoiled(self) -> bool:
        return self.broken > 0

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        x: torch.Tensor = result.detach()
        self.add(x.reshape(x.shape[0] if self.grouped else 1, -1, x.shape[-1]), weight)

    def add(self, x: torch.Tensor, weight: float) -> None:
        """`x`: `[experts, tokens, K]`."""
        experts, tokens, columns = x.shape
        self.runs += 1
        if not x.numel():
            return
        width = columns if self.width is None else self.width
        x = torch.nn.functional.pad(x.double() if self.double else x.float(), (0, -columns % width))
        blocks = x.view(experts, tokens, -1, width).transpose(1, 2)
        found = blocks.transpose(-1, -2) @ blocks
        if not bool(found.isfinite().all()):
            blocks = blocks.double()  # what float32 holds, its squares may leave
            found = blocks.transpose(-1, -2) @ blocks
        if not bool(found.isfinite().all()):
            self.broken += 1
            return
        self.sum.add(found.cpu().double().mul_(weight))
        self.tokens = self.tokens + counted((x != 0).any(-1).sum(-1).cpu().double(), weight)

    def merge(self, other: Self) -> None:
        self.lost = self.lost or other.lost
        self.sum.merge(other.sum)
        self.runs, self.broken = self.runs + other.runs, self.broken + other.broken
        self.tokens = self.tokens + other.tokens

    def tensors(self) -> dict[str, torch.Tensor]:
        numbers = {"broken": torch.tensor(self.broken), "runs": torch.tensor(self.runs)}
        return {**self.sum.tensors(), "tokens": self.tokens, **numbers}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.sum = ExactSum.loaded(tensors)
        self.tokens, self.runs, self.broken = tensors["tokens"], int(tensors["runs"]), int(tensors["broken"])

    def blocks(self, width: int, columns: int) -> torch.Tensor | None:
        """`[experts or 1, ceil(K / width), width, width]`, of a width that divides the one that is kept, or of a
        whole second moment; None where nothing but zeros came."""
        total = self.sum.total()
        if total is None:
            return None
        missing = -total.shape[-1] % width
        total = torch.nn.functional.pad(total, (0, missing, 0, missing)) if missing else total
        parts = total.shape[-1] // width
        cut = total.view(*total.shape[:2], parts, width, parts, width).diagonal(dim1=2, dim2=4)  # [E, n, w, w, parts]
        found = cut.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return found[:, : -(-columns // width)]
