"""Statistics in a state: what algorithms want beyond largest magnitudes, so that they solve later, and of all shards.

A tensor of one is called `@0/linear/SecondMoment/high`: by step of the recipe, node of the graph, kind and name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from qcompile.algorithms import ask
from qcompile.algorithms.base import Algorithm, View
from qcompile.algorithms.inputs import ExpertMoment, RoutedMoment
from qcompile.algorithms.second_moment import SecondMoment
from qcompile.algorithms.statistics import Histogram, Largest, Statistic
from qcompile.errors import CalibrationError
from qcompile.messages import first_line
from qcompile.quantization.parts import parts_of
from qcompile.quantization.seen import Observation
from qcompile.quantization.state import ABOUT

__all__ = ["Kept", "has_statistics", "keep", "merged_statistics", "wants_statistics"]

State = Mapping[str, torch.Tensor]

_KINDS: dict[str, Statistic] = {
    type(kind).__name__: kind
    for kind in (Largest(), Histogram(), SecondMoment(), ExpertMoment(None), RoutedMoment(None))
}


def wants_statistics(steps: Sequence[Algorithm[Any]], view: View) -> bool:
    """Whether largest magnitudes alone do not say what `steps` would choose for `view`."""
    watched = (kept for step in steps for kept in ask.watch(step, view).values())
    return any(type(kept) is not Largest for kept in watched)


def keep(steps: Sequence[Algorithm[Any]], view: View, observation: Observation) -> dict[str, torch.Tensor]:
    """What `steps` watch of `view` over all data; with a walk for each part, where one is to take no more memory."""
    found: dict[str, torch.Tensor] = {}
    also: dict[Node, Statistic] = {operand.node: Largest() for operand in view.activations}
    for index, step in enumerate(steps):
        name = step.settings.algorithm
        if step.sequential or type(step).edits is not Algorithm.edits:
            raise CalibrationError(
                f"{name} needs the data again behind each change that it makes, which no state stands for: give"
                " batches to quantize, or calibrate for ranges alone"
            )
        parts = parts_of(step, view)
        for operands in parts:
            watched = ask.watch(step, view.of(operands, view.quantizers))
            for node, kept in observation.of(watched, also).items():
                kind, tensors = type(kept), kept.tensors()
                if tensors and type(_KINDS.get(kind.__name__)) is not kind:
                    raise CalibrationError(
                        f"{name} keeps {kind.__name__}, which no state holds: give batches to quantize"
                    )
                prefix = f"{ABOUT}{index}/{node.name}/{kind.__name__}"
                found |= {f"{prefix}/{part}": tensor for part, tensor in tensors.items()}
            if parts[1:]:
                observation.drop(watched)
    return found


def has_statistics(state: State) -> bool:
    return any(str(name).startswith(ABOUT) and "/" in name for name in state)


def merged_statistics(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """Those of all `states`, by the rule of each kind."""
    parts = [_grouped(state) for state in states]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise CalibrationError("the states of the shards hold statistics of different tensors: calibrate them again")
    found: dict[str, torch.Tensor] = {}
    for prefix in parts[0]:
        whole = _loaded(prefix, parts[0][prefix])
        for part in parts[1:]:
            whole.merge(_loaded(prefix, part[prefix]))
        found |= {f"{prefix}/{name}": tensor for name, tensor in whole.tensors().items()}
    return found


class Kept:
    """Stands for an `Observation`, with what a state has kept of it."""

    def __init__(self, state: State, steps: Sequence[Algorithm[Any]]) -> None:
        """`steps` of the recipe, in their order."""
        self._groups, self._steps = _grouped(state), steps

    def has(self, step: Algorithm[Any], watched: Mapping[Node, Statistic]) -> bool:
        """Whether anything was kept of what `step` watches."""
        return any(self._find(step, node, kind) is not None for node, kind in watched.items())

    def of(self, step: Algorithm[Any], watched: Mapping[Node, Statistic]) -> dict[Node, Statistic]:
        """What was kept. Raises CalibrationError for what was not."""
        for node, kind in watched.items():
            if not kind.tensors():
                continue
            prefix = self._find(step, node, kind)
            if prefix is None:
                raise CalibrationError(
                    f"the calibrated state has no {type(kind).__name__} of {node.name}: calibrate with the same model,"
                    " example inputs and recipe"
                )
            _load(kind, prefix, self._groups[prefix])
        return dict(watched)

    def _find(self, step: Algorithm[Any], node: Node, kind: Statistic) -> str | None:
        if type(kind) is Largest:  # which every kind of it tells
            for prefix in self._groups:
                if prefix.split("/")[1:] in ([node.name, "Histogram"], [node.name, "Largest"]):
                    return prefix
            return None
        index = next((number for number, own in enumerate(self._steps) if own is step), None)
        prefix = f"{ABOUT}{index}/{node.name}/{type(kind).__name__}"
        return prefix if prefix in self._groups else None


def _grouped(state: State) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(ABOUT) and "/" in name:
            prefix, _, part = name.rpartition("/")
            found.setdefault(prefix, {})[part] = tensor
    return found


def _loaded(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Statistic:
    kind = _KINDS.get(prefix.rpartition("/")[2])
    if kind is None:
        raise CalibrationError(f"the state is damaged, or of another version: it holds {prefix}")
    made: Statistic = type(kind)(None) if isinstance(kind, ExpertMoment) else type(kind)()
    _load(made, prefix, tensors)
    return made


def _load(kind: Statistic, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    wanted = kind.tensors()  # a histogram has more than the largest magnitude that may be all that is wanted of it
    if any(name not in tensors or wanted[name].dtype != tensors[name].dtype for name in wanted):
        raise CalibrationError(f"the state is damaged, or of another version, in {prefix}")
    try:
        kind.load({name: tensors[name].clone() for name in wanted})
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(f"the state is damaged in {prefix}: {first_line(error)}") from error
