"""Which batches of the calibration data are seen here, where several processes share them out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.algorithms.growth import RangeLog
from qcompile.algorithms.statistics import Statistic
from qcompile.capture.batch_notices import BatchLog
from qcompile.errors import CalibrationError


@dataclass(frozen=True)
class Share:
    """Every `count`-th batch, from the one with number `index` on.

    What statistics keep does not depend on who saw which batch, or when, so any share would do. With every n-th one,
    data need not say how many there are, shares differ by one batch at most, and data that come sorted, by length or by
    kind, are mixed in each.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_shard(cls, shard: object) -> Share:
        """`(2, 8)` is the second of eight. Raises CalibrationError for what is none."""
        if isinstance(shard, Sequence) and len(shard) == 2 and all(type(number) is int for number in shard):
            number, count = shard
            if 1 <= number <= count:
                return cls(number - 1, count)
        raise CalibrationError(f"shard={shard!r}: (2, 8) is the second of eight, and (8, 8) the last")

    def __str__(self) -> str:
        return f"shard {self.index + 1} of {self.count}"

    def of(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Its batches, each with its number among all."""
        if isinstance(batches, Sequence) and self.count > 1:  # those of others are not even made
            for index in self.numbers(len(batches)):
                yield index, batches[index]
        else:
            for index, batch in enumerate(batches):
                if index % self.count == self.index:
                    yield index, batch

    def agree(self, facts: Callable[[], Mapping[str, Hashable]]) -> None:
        """Raise JoinedError unless all that share have the same `facts`, which nobody asks for where there is one."""

    def failed(self, error: Exception) -> None:
        """Tell the others that nothing will come from here."""

    def join(self, statistics: Sequence[Statistic], log: BatchLog, ranges: RangeLog | None) -> None:
        """Make of what was kept here what all together have seen."""

    def numbers(self, total: int) -> range:
        """Of its batches, where there are `total`."""
        return range(self.index, total, self.count)


WHOLE = Share()
