"""Weights in parts, where what a step watches of all of them would take more memory than it is given."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from passes.quantize.insert import Quantizer
from qcompile.algorithms import ask
from qcompile.algorithms.base import Algorithm, Operand, View
from qcompile.algorithms.inputs import expression
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.quantization.seen import Observation

__all__ = ["once", "parts_of", "solve_parts"]


def parts_of(step: Algorithm[Any], view: View) -> list[list[Operand]]:
    """The operands of `view` in the order of the graph, as many together as the memory of `step` allows.

    Those that share a tensor which is watched, a scale, or a weight stay together, whatever that takes.
    """
    operands, limit = list(view.operands), step.memory
    if limit is None or _bytes(ask.watch(step, view)) <= limit:
        return [operands]
    parts: list[set[Operand]] = [set()]
    taken = 0
    for together in _inseparable(step, view):
        size = _bytes(ask.watch(step, view.of(together, view.quantizers)))
        if taken and size and taken + size > limit:
            parts.append(set())
            taken = 0
        parts[-1].update(together)
        taken += size
    return [[operand for operand in operands if operand in part] for part in parts]


def solve_parts(
    step: Algorithm[Any], view: View, parts: Sequence[Sequence[Operand]], observation: Observation
) -> dict[Operand, Quantizer]:
    """What `step` chooses for each of `parts`, with a walk over the data for each: what the others watch is let go.

    The first walk also sees the ranges of all activations.
    """
    also: dict[Node, Statistic] = {operand.node: Largest() for operand in view.activations}
    found: dict[Operand, Quantizer] = {}
    notices: list[str] = []
    for operands in parts:
        part = replace(view.of(operands, view.quantizers), notices=notices)
        watched = ask.watch(step, part)
        found |= ask.solve(step, part, observation.of(watched, also))
        observation.drop(watched)
        also = {}
    view.notices += [*once(notices), _told(step, view, len(parts))]
    return found


def _told(step: Algorithm[Any], view: View, walks: int) -> str:
    """How often data is walked, and why."""
    size = _bytes(ask.watch(step, view))
    return (
        f"{step.settings.algorithm} would keep {size / 1e9:.3g} GB of what layers read, and its memory is"
        f" {step.memory or 0:.3g} bytes: weights were solved in {walks} parts, with a walk over the calibration data"
        " for each"
    )


def once(notices: Iterable[str]) -> list[str]:
    """Of notices that begin alike, as one step gives them of each part, the first."""
    first: dict[str, str] = {}
    for notice in notices:
        first.setdefault(notice.partition(":")[0], notice)
    return list(first.values())


def _bytes(watched: Mapping[Node, Statistic]) -> int:
    return sum(statistic.memory(node) for node, statistic in watched.items())


def _inseparable(step: Algorithm[Any], view: View) -> list[list[Operand]]:
    """Operands that have to be solved together, in the order of the graph."""
    clusters: dict[Hashable, list[Operand]] = {}  # what operands can have in common -> those that do
    for operand in sorted(view.operands, key=lambda operand: operand.site.consumer):
        keys: list[Hashable] = [operand, *view.group(operand), *ask.watch(step, view.of([operand], view.quantizers))]
        if operand.kind == "weight":
            keys.append(expression(operand.node))
        joined = {id(cluster): cluster for key in keys if (cluster := clusters.get(key)) is not None}
        own = [*(member for cluster in joined.values() for member in cluster), operand]
        clusters |= {key: own for key, cluster in clusters.items() if id(cluster) in joined} | dict.fromkeys(keys, own)
    return list({id(cluster): cluster for cluster in clusters.values()}.values())
