"""`svdquant`: the largest part of a weight stays in half as two thin factors, and only the rest is quantized."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from passes.codes import block_scale_numbers
from passes.graph import aten
from passes.groups import parallel, reads
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.place.low_rank import LowRank, SplitLowRank, SplitProduct
from passes.places import Pipeline
from qcompile.algorithms.base import Algorithm, Operand, Seen, View
from qcompile.algorithms.low_rank import largest_part
from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.algorithms.second_moment import ExactSum
from qcompile.algorithms.settings import SvdquantSettings
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import CalibrationError

_OTHERS = "low-rank parts are for linear layers, of which this is none"
_OUTPUT = "its output is quantized, and what the low-rank part adds would come behind that"
_SHARED = "its weight is read by layers of another group, too"
_TWICE = "it has a low-rank part from a step before"
_ZEROS = "its weight is all zeros"
_LEAST_RANK = 8  # back ends multiply no fewer at a time
_LEAST = 1e-4  # of the largest channel: one that was zero in calibration may not be later

Group = Sequence[Operand]


class Svdquant(Algorithm[SvdquantSettings]):
    """SVDQuant (Li et al. 2024, arXiv 2411.05007) without its smoothing, which is a step of its own.

    Layers that read one tensor share the first factor, so that all of it is one product: the part is that of their
    weights as one matrix. A rank whose factors would take more bytes than the codes save is halved; a group that no
    rank pays for gets no part.
    """

    model = SvdquantSettings

    def watch(self, view: View) -> dict[Node, Statistic]:
        if self.settings.weighting == "none":
            return {}
        groups, _ = self._groups(view)
        return {group[0].site.consumer.args[0]: Squares() for group in groups}  # type: ignore[misc]

    def edits(self, view: View, seen: Seen) -> Pipeline:
        groups, left = self._groups(view)
        found: dict[tuple[object, ...], list[Group]] = defaultdict(list)
        for group in groups:
            found[tuple(map(_key, group))].append(group)
        parts: dict[tuple[Node, ...], LowRank] = {}
        for same in found.values():
            part = self._part(same, seen)
            parts |= {tuple(weight.site.consumer for weight in group): part for group in same}
        return Pipeline(partial(SplitLowRank, parts, left)) if parts or left else Pipeline()

    def _groups(self, view: View) -> tuple[list[Group], dict[Node, str]]:
        """Weights that read one tensor, and the layers that get no part -> why."""
        left: dict[Node, str] = {}
        candidates = []
        with_output = {operand.site.consumer for operand in view.activations if operand.kind == "output"}
        for weight in view.weights:
            consumer = weight.site.consumer
            if consumer.target is not aten.linear.default:
                left[consumer] = _OTHERS
            elif SplitProduct.read(consumer) is not None:
                left[consumer] = _TWICE
            elif consumer in with_output:
                left[consumer] = _OUTPUT
            elif not bool(weight.amax().any()):
                left[consumer] = _ZEROS
            else:
                candidates.append(weight)
        groups = parallel(candidates, lambda weight: reads(weight.site.consumer, weight.format, weight.per_channel))
        kept: list[Group] = []
        together = Counter(key for keys in {tuple(map(_key, group)) for group in groups} for key in keys)
        for group in groups:
            reason = _SHARED if any(together[_key(weight)] > 1 for weight in group) else self._unpaid(group)
            if reason is None:
                kept.append(group)
            else:
                left |= {weight.site.consumer: reason for weight in group}
        return kept, left

    def _rank(self, group: Group) -> int:
        """For each layer of `group`: `rank`, or its half, and so on, whatever is worth its bytes; 0 if none is."""
        rank, (factors, saved) = self.settings.rank, _bytes(group)
        while factors * rank >= saved and rank > _LEAST_RANK:
            rank = max(_LEAST_RANK, rank // 2 // _LEAST_RANK * _LEAST_RANK)
        return rank if factors * rank < saved else 0

    def _unpaid(self, group: Group) -> str | None:
        """Why a part of `group` is not worth its bytes, or None."""
        if self._rank(group):
            return None
        rank, rows, columns = min(self.settings.rank, _LEAST_RANK), sum(w.shape[0] for w in group), group[0].shape[1]
        factors, saved = _bytes(group)
        factors, rank = factors * rank, rank * len(group)
        return (
            f"a low-rank part of rank {rank} takes {factors:,} bytes, and its codes save {saved:,} of a weight of"
            f" [{rows}, {columns}]"
        )

    def _part(self, same: Sequence[Group], seen: Seen) -> LowRank:
        """What the weights of groups have in common that are the same ones, read by several calls."""
        group = same[0]
        values = torch.cat([_values(weight) for weight in group])
        columns = self._columns(same, seen).to(values.device)
        rank = self._rank(group) * len(group)
        up, down = largest_part(values * columns, rank)
        for _ in range(self.settings.iterations):
            rest = values - up @ (down / columns)
            rounded = _round_trip(group, rest, self.settings.power_of_two)
            up, down = largest_part((values - rounded) * columns, rank, start=down)
        return _stored(up, down / columns, group)

    def _columns(self, same: Sequence[Group], seen: Seen) -> torch.Tensor:
        """What each column of the weights counts, `[K]`."""
        first = same[0][0]
        if self.settings.weighting == "none":
            return torch.ones(first.shape[1])
        kept: list[Any] = [seen[group[0].site.consumer.args[0]] for group in same]  # type: ignore[index]
        total: torch.Tensor = functools.reduce(torch.add, [one.total for one in kept])
        size: torch.Tensor = total.sqrt()
        largest = size.max()
        if not bool(largest.isfinite()):
            first_lost = next((one.first_lost for one in kept if one.lost), "")
            raise CalibrationError(
                f"{first.name}: calibration found {float(largest)} in what the layer reads{first_lost}"
            )
        if not bool(largest > 0):  # never reached, or zero in all of it
            return torch.ones(first.shape[1])
        weights: torch.Tensor = (size / largest).clamp_min(_LEAST).float()
        return weights


class Squares(Statistic):
    """Sum of squares of each channel, the last axis.

    Attributes:
        total: `[K]`, in float64, or zero where nothing else came. count: how many tokens it is the sum of.
    """

    additive = True

    def __init__(self) -> None:
        self.sum, self.count = ExactSum(), 0.0

    @property
    def spoiled(self) -> bool:
        return not bool(self.total.isfinite().all())

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        rows = result.detach().reshape(-1, result.shape[-1])
        self.sum.add(rows.double().square().sum(0).cpu().mul_(weight))
        self.count += rows.shape[0] * weight

    def merge(self, other: Squares) -> None:
        self.sum.merge(other.sum)
        self.count += other.count
        self.lost = self.lost or other.lost

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self.sum.tensors(), "count": torch.tensor(self.count, dtype=torch.float64)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.sum, self.count = ExactSum.loaded(tensors), float(tensors["count"])

    @property
    def total(self) -> torch.Tensor:
        found = self.sum.total()
        return torch.zeros((), dtype=torch.float64) if found is None else found


def _key(weight: Operand) -> object:
    """What tells weights apart: two calls of one layer have one."""
    node = weight.node
    return node.target if node.op == "get_attr" else node


def _bytes(group: Group) -> tuple[int, int]:
    """(of the factors for each unit of rank, what codes save) of the weights of `group`."""
    rows, columns, size = sum(weight.shape[0] for weight in group), group[0].shape[1], group[0].dtype.itemsize
    return size * len(group) * (rows + columns), round((size - group[0].format.element_bytes) * rows * columns)


def _values(weight: Operand) -> torch.Tensor:
    return torch.cat([values.float() for _, values in weight.rows()])


def _round_trip(group: Group, values: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """`values`, the weights of `group` as one, as codes with the scales of `max` would give them back."""
    config, fmt = group[0].config, group[0].format
    scale = None
    if has_constant(config):
        amax = values.abs().amax(-1, keepdim=True) if group[0].per_channel else values.abs().amax()
        scale = group[0].stored(scale_of(amax, config, power_of_two)).float()
    if fmt.sizes:
        codes, blocks = DYNAMIC_QUANTIZE(values, scale, format=fmt.name)
        scale = block_scale_numbers(blocks, scale, fmt)
    else:
        codes = QUANTIZE(values, scale, format=fmt.name)
    result: torch.Tensor = DEQUANTIZE(codes, scale, format=fmt.name, dtype=torch.float32)
    return result


def _stored(up: torch.Tensor, down: torch.Tensor, group: Group) -> LowRank:
    """The factors in the dtype that the program computes in, rows of the first of length 1, as a singular vector's."""
    length = down.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    dtype, sizes = group[0].dtype, [weight.shape[0] for weight in group]
    up = (up * length.T).to(dtype)
    if not bool(up.isfinite().all()):
        raise CalibrationError(
            f"{group[0].name}: the low-rank part of the weight leaves {dtype}: compute in another dtype"
        )
    return LowRank((down / length).to(dtype), torch.split(up, sizes))
