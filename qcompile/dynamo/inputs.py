"""A graph with weights as `get_attr` becomes a function of them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from passes.compat import FakeTensorMode
from passes.constants import constant, equal_bits
from qcompile.compat.dynamo import set_source
from qcompile.dynamo.names import STATIC
from qcompile.dynamo.trace import Traced


@dataclass(frozen=True)
class Main:
    """A graph without tensors of its own.

    Attributes:
        gm: placeholders are the user's inputs, then the constants.
        fakes: a fake tensor or a symbolic size for each placeholder.
        constants: a tensor that passes made, or the position of a weight among Dynamo's arguments.
        structure: equal for graphs that one compiled function serves.
    """

    gm: GraphModule
    fakes: Sequence[Any]
    constants: Sequence[torch.Tensor | int]
    structure: object


# (weights of a graph, name) -> what passes made: Dynamo compiles a frame again for other sizes or without gradients,
# and codes of the same weights are kept once
_MADE: weakref.WeakValueDictionary[tuple[tuple[int, ...], str], torch.Tensor] = weakref.WeakValueDictionary()


def weights_as_inputs(
    gm: GraphModule, traced: Traced, weights: Mapping[str, torch.Tensor], fake_mode: FakeTensorMode
) -> Main:
    """`gm` with a placeholder for each of its tensors, behind those of the user."""
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        copied[node] = graph.node_copy(node)
    inputs = list(copied.values())
    constants: dict[str, torch.Tensor | int] = {}
    owners: dict[str, Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name, tensor = str(node.target), constant(gm, node)
        if tensor is None:
            continue  # the graph of a control-flow operator
        if name not in owners:
            owners[name] = graph.placeholder(f"c_{len(owners)}")  # one structure for blocks of whatever name
            owners[name].meta = copy.copy(node.meta)
            is_weight = name in weights and tensor is weights[name]
            constants[name] = traced.weights[name] if is_weight else _shared(tensor.detach(), name, weights)
        copied[node] = owners[name]
    for node in gm.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    subgraphs = {n: getattr(gm, n) for n in (str(g.target) for g in graph.find_nodes(op="get_attr"))}
    main = GraphModule(subgraphs, graph)
    _mark_static(main, list(owners.values()))
    tensors = [weights[n] if isinstance(c, int) else c for n, c in constants.items()]
    fakes = [fake_mode.from_tensor(t, static_shapes=True) for t in tensors]
    for node, fake in zip(owners.values(), fakes, strict=True):
        node.meta["val"] = fake
    shapes = tuple(map(_layout, tensors))
    code = tuple(part.code for part in main.modules() if isinstance(part, GraphModule))
    return Main(main, [n.meta["val"] for n in inputs] + fakes, list(constants.values()), (code, shapes))


def _shared(tensor: torch.Tensor, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`tensor`, or one with the same numbers that another graph of the same weights has."""
    key = (tuple(map(id, weights.values())), name)
    known = _MADE.get(key)
    if known is not None and _layout(known) == _layout(tensor) and equal_bits(known, tensor):
        return known
    _MADE[key] = tensor
    return tensor


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _mark_static(gm: GraphModule, constants: Sequence[Node]) -> None:
    """Say as Dynamo does that the tensors behind `constants` stay where they are: CUDA graphs do not copy them then.

    Of buffers and caches that the graph writes to it was said where they were read. AOTAutograd believes it of graphs
    that look like Dynamo's own only, with a source for each input.
    """
    gm.meta["dynamo_compile_id"] = None
    gm.__dict__["_param_name_to_source"] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        set_source(node, None)
    for node in constants:
        node.meta.update(STATIC)
