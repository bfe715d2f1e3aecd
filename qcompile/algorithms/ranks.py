"""Calibration over the ranks of torch.distributed: each sees its share of the batches, and all know what all have seen.

Statistics are gathered and merged in the order of ranks, by their own rule: a sum over gloo has other bits with other
numbers of ranks, and MAX keeps or loses a NaN by rank and size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from qcompile.algorithms.growth import RangeLog
from qcompile.algorithms.share import WHOLE, Share
from qcompile.algorithms.statistics import Statistic
from qcompile.capture.batch_notices import BatchLog
from qcompile.errors import JoinedError, QCompileError
from qcompile.messages import first_line

_SMALL = 1 << 16  # bytes of a tensor that travels with others, and not alone: there are thousands of scalars
_NUMPY = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)


def ranks() -> Share:
    """The share of this process in the default group; all where there is none."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return WHOLE
    return Ranks(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Ranks(Share):
    """That of a rank. All ranks have to call what calibrates, with the same arguments."""

    def __str__(self) -> str:
        return "this process"

    def agree(self, facts: Callable[[], Mapping[str, Hashable]]) -> None:
        own = dict(facts())
        for rank, others in enumerate(self._gathered(own)):
            if what := [name for name, fact in own.items() if others.get(name) != fact]:
                raise JoinedError(
                    f"rank {rank} and rank {self.index} were given different {what[0]}: every rank is given the same"
                    " model, recipe and calibration data, and takes its share of the batches"
                )

    def failed(self, error: Exception) -> None:
        try:
            self._told((str(error) if isinstance(error, QCompileError) else first_line(error), None))
        except JoinedError as told:
            if told.__cause__ is None:
                raise told from error
            # nobody is there to be told: the error itself says more than that

    def join(self, statistics: Sequence[Statistic], log: BatchLog, ranges: RangeLog | None) -> None:
        own = [statistic.tensors() for statistic in statistics]
        heads = [{name: _head(tensor) for name, tensor in tensors.items()} for tensors in own]
        found = self._told((None, (log.facts(), ranges.facts() if ranges is not None else None, heads)))
        log.join([facts for facts, _, _ in found])
        if ranges is not None:
            ranges.join([facts for _, facts, _ in found if facts is not None], log.batches)
        for number, statistic in enumerate(statistics):
            parts = (self._part(rank, facts[number], own[number]) for rank, (_, _, facts) in enumerate(found))
            statistic.load(_merged(statistic, parts).tensors())

    def _told(self, own: tuple[str | None, Any]) -> list[Any]:
        """What each rank has, if all came so far. Raises JoinedError, with what the first has to say that did not."""
        found = self._gathered(own)
        for rank, (problem, _) in enumerate(found):
            if problem is not None:
                raise JoinedError(f"rank {rank}: {problem}")
        return [facts for _, facts in found]

    def _gathered(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with _told_apart():
            dist.all_gather_object(found, own, group=_group(dist.group.WORLD))
        return found

    def _part(self, rank: int, heads: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one statistic on a rank."""
        found = {}
        for name, head in heads.items():
            if not isinstance(head, tuple):
                found[name] = torch.from_numpy(head)
                continue
            dtype, size = head
            found[name] = (
                own[name].detach().cpu().contiguous() if rank == self.index else torch.empty(size, dtype=dtype)
            )
            self._send(found[name].view(-1).view(torch.uint8), rank)  # gloo does not know every dtype
        return found

    def _send(self, data: torch.Tensor, rank: int) -> None:
        """Bytes of a rank into those of the others."""
        with _told_apart():
            dist.broadcast(data, rank, group=_group(dist.group.WORLD))


def _merged(kind: Statistic, parts: Iterator[dict[str, torch.Tensor]]) -> Statistic:
    found: Statistic | None = None
    for tensors in parts:
        part = copy.copy(kind)
        part.load(tensors)
        if found is None:
            found = part
        else:
            found.merge(part)
    assert found is not None
    return found


def _head(tensor: torch.Tensor) -> Any:
    """A small tensor as it is, as many travel together; the form of a large one, or of one that numpy does not know."""
    tensor = tensor.detach().cpu()
    small = tensor.numel() * tensor.element_size() <= _SMALL and tensor.dtype in _NUMPY
    return tensor.numpy().copy() if small else (tensor.dtype, tensor.shape)


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Says what it means when a collective call fails."""
    try:
        yield
    except RuntimeError as error:
        raise JoinedError(
            "another process of the group has ended, or did not calibrate within the timeout of the group: every rank"
            f" has to call what calibrates, and to come through ({first_line(error)})"
        ) from error


@functools.lru_cache(maxsize=1)
def _group(world: Any) -> Any:
    """A group whose tensors are on the CPU, where statistics are."""
    if "gloo" in str(dist.get_backend_config(world)):
        return world
    return dist.new_group(backend="gloo")
