"""Sequential calibration: weights are solved by segments, each with inputs as quantized ones before it give them.

A segment is a block that the model repeats, or a layer beside these. Data is walked once for each, as far as it goes:
in a model of S blocks that takes about S / 2 times what one walk does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.constants import constant, replace_with_constant
from passes.graph import is_call, val
from passes.ir import DEQUANTIZE
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site
from passes.subgraphs import copied_graph, owner
from qcompile.algorithms import ask
from qcompile.algorithms.base import Algorithm, Operand, View
from qcompile.process import alone
from qcompile.quantization.parts import once, parts_of
from qcompile.quantization.seen import Observation

_BLOCK = re.compile(r"(.*?\.\d+|\d+)(?:\.|$)")  # layers.3.mlp.up_proj -> layers.3


def segment_of(module: str) -> str:
    """The repeated block that a module is in, by the first number of its path; itself if it is in none."""
    found = _BLOCK.match(module)
    return found[1] if found else module


@dataclass
class Segments:
    """Solves the weights of a graph in its order.

    Attributes:
        observation: of the graph, which stays as it is.
        known: the quantizers of everything that is no weight.
    """

    observation: Observation
    known: Mapping[Site, Quantizer]
    _copies: dict[Node, Node] = field(default_factory=dict)

    def solve(self, step: Algorithm[Any], view: View) -> dict[Operand, Quantizer]:
        """What `step` chooses for the weights of `view`."""
        with alone():
            copy = copied_graph(self.observation.gm, self._copies)
        found: dict[Operand, Quantizer] = {}
        notices: list[str] = []
        for operands in _in_order(view.weights):
            solved: dict[Operand, Quantizer] = {}
            for members in parts_of(step, view.of(operands, view.quantizers)):
                part = replace(view.of(members, view.quantizers), notices=notices)
                watched = ask.watch(step, part)
                if watched:
                    self.observation.through(copy, {self._copies[node]: kept for node, kept in watched.items()})
                solved |= ask.solve(step, part, watched)
            found |= solved
            with alone():
                self._quantize(copy, operands, solved)
        view.notices += once(notices)
        return found

    def _quantize(self, copy: GraphModule, operands: Sequence[Operand], solved: Mapping[Operand, Quantizer]) -> None:
        """Put what was chosen for a segment, and what is known of its activations, into the copy."""
        place = segment_of(operands[0].site.module)
        chosen = {site: quantizer for site, quantizer in self.known.items() if segment_of(site.module) == place}
        chosen |= {operand.site: quantizer for operand, quantizer in solved.items()}
        placed = {site: quantizer.to(val(site.tensor).device) for site, quantizer in chosen.items()}
        moved = {replace(site, consumer=self._copies[site.consumer]): quantizer for site, quantizer in placed.items()}
        InsertQdq(moved)(copy)
        for site in moved:
            if site.operand == "weight":
                _store(owner(site.tensor), site.tensor)


def _in_order(weights: Iterable[Operand]) -> list[list[Operand]]:
    """Weights by segment, in the order of the graph."""
    segments: dict[str, list[Operand]] = {}
    for weight in sorted(weights, key=lambda weight: weight.site.consumer):
        segments.setdefault(segment_of(weight.site.module), []).append(weight)
    return list(segments.values())


def _store(gm: GraphModule, pair: Node) -> None:
    """A quantized weight as its numbers: it would be quantized anew in every run."""
    if is_call(pair, DEQUANTIZE):
        replace_with_constant(gm, pair, _value(gm, pair))


def _value(gm: GraphModule, node: object) -> Any:
    if not isinstance(node, Node):
        return node
    found = constant(gm, node)
    if found is not None:
        return found.detach()
    with torch.no_grad():
        return node.target(*(_value(gm, arg) for arg in node.args), **node.kwargs)  # type: ignore[operator]
