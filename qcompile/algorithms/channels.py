"""What is kept of the channels of an activation: how large each gets, and some of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from qcompile.algorithms.second_moment import ExactSum
from qcompile.algorithms.statistics import Statistic

_HASHED = 256  # channels that a row is told apart by
_FITTING = 3 << 61  # an eighth of all signed numbers is not below it
_SIGN = -(1 << 63)
_GOLDEN = -7046029254386353131  # 2^64 / the golden ratio, odd, as a signed number


@dataclass(frozen=True)
class Sizes:
    """The largest and the mean magnitude of each channel, `[K]`, float32."""

    largest: torch.Tensor
    mean: torch.Tensor


class Channels(Statistic):
    """Largest and mean magnitude of each channel (of the last axis), and a sample of rows.

    Every row has a number that is a hash of what it holds. The rows with a negative one, seven of eight, are held out:
    among them are those of the sample, the ones with the least numbers, so that it is the same whatever the order of
    the data and on however many machines it was seen; a row that is seen twice is kept once.

    Attributes:
        largest, held: over the rows that are not held out, and over those that are; `[K]`, float32.
        sum, count: of the magnitudes of all rows, `[K]`, and how many there were.
        rows, keys: the sample `[R, K]` and its numbers, in their order. Rows that are not held out fill it up.
    """

    additive: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        """`size`: how many rows are kept."""
        self.size = size
        self.largest, self.held, self.sum = torch.zeros(0), torch.zeros(0), ExactSum()
        self.count = 0.0
        self.rows, self.keys = torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)

    @property
    def spoiled(self) -> bool:
        return not bool((self.largest.isfinite() & self.held.isfinite()).all())

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        x = result.detach().float().reshape(-1, result.shape[-1]).cpu()
        if not x.numel():
            return
        keys, magnitude = _keys(x), x.abs()
        own = keys >= 0
        zero = torch.zeros(x.shape[1])
        self._add(
            magnitude[own].amax(0) if bool(own.any()) else zero,
            magnitude[~own].amax(0) if not bool(own.all()) else zero,
            x.shape[0] * weight,
        )
        self.sum.add(magnitude.sum(0, dtype=torch.float64).mul_(weight))
        found, order = keys.sort(stable=True)
        order = order[_first(found)][: self.size]
        if len(self.keys) == self.size:  # what is behind all that is kept is not copied
            order = order[keys[order] < self.keys[-1]]
        self._sample(x[order], keys[order])

    def _add(self, largest: torch.Tensor, held: torch.Tensor, count: float) -> None:
        if not self.count:
            self.largest, self.held = largest, held
        else:
            self.largest, self.held = torch.maximum(self.largest, largest), torch.maximum(self.held, held)
        self.count += count

    def _sample(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        if not len(keys):
            return
        joined, order = torch.cat([self.keys, keys]).sort(stable=True)
        kept = order[_first(joined)][: self.size]
        self.keys = torch.cat([self.keys, keys])[kept]
        self.rows = (torch.cat([self.rows, rows]) if len(self.rows) else rows)[kept]

    def merge(self, other: Self) -> None:
        self.lost = self.lost or other.lost
        if other.count:
            self._add(other.largest, other.held, other.count)
            self.sum.merge(other.sum)
            self._sample(other.rows, other.keys)

    def tensors(self) -> dict[str, torch.Tensor]:
        count = torch.tensor(self.count, dtype=torch.float64)
        sample = {"rows": self.rows, "keys": self.keys}
        return {"largest": self.largest, "held": self.held, "count": count, **self.sum.tensors(), **sample}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.largest, self.held, self.sum = tensors["largest"], tensors["held"], ExactSum.loaded(tensors)
        self.count = float(tensors["count"])
        self.rows, self.keys = tensors["rows"], tensors["keys"]

    @property
    def sizes(self) -> Sizes:
        """How large the channels are."""
        largest, total = torch.maximum(self.largest, self.held), self.sum.total()
        return Sizes(largest, torch.zeros_like(largest) if total is None else (total / self.count).float())

    @property
    def fitting(self) -> Sizes:
        """How large they are in the rows that are not held out; in all where there is none."""
        return Sizes(self.largest, self.sizes.mean) if bool((self.largest > 0).any()) else self.sizes

    @property
    def held_out(self) -> torch.Tensor:
        """The rows of the sample that are held out; all of them where there is none."""
        mine = self.keys < 0
        return self.rows[mine] if bool(mine.any()) else self.rows


def _keys(x: torch.Tensor) -> torch.Tensor:
    """A number for each row of `x` `[M, K]`, float32, that depends on its bits alone."""
    step = -(-x.shape[1] // _HASHED)
    bits = (x[:, ::step] + 0.0).contiguous().view(torch.int32).long()  # -0.0 is 0.0
    factors = (torch.arange(1, bits.shape[1] + 1) * _GOLDEN) | 1
    mixed = (bits * factors).sum(1)
    mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
    return torch.where(mixed >= _FITTING, mixed, mixed | _SIGN)


def _first(ordered: torch.Tensor) -> torch.Tensor:
    """Which of some numbers in their order are not equal to the one before."""
    new = torch.ones(len(ordered), dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return new
