"""Calls that hold graphs of their own: `torch.cond`, `while_loop`, `scan`, `map`, `flex_attention`.

Such a call reads its graphs by `get_attr`, and everything that they compute with is an operand: weights, too. Passes
work on the graphs of the first three as on any other; for that `passes.subgraph_constants` brings their weights in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from passes.graph import calls

__all__ = [
    "OPERANDS",
    "all_calls",
    "all_nodes",
    "copied_graph",
    "graphs",
    "held",
    "inner",
    "is_scan",
    "is_worked_on",
    "operands_of",
    "operator_name",
    "outer_operands",
    "owner",
    "subgraph_calls",
]

OPERANDS = 3  # the argument of each operator of the following that goes to the last inputs of its graphs
_WORKED_ON = ("cond", "while_loop", "scan")


def subgraph_calls(graph: Graph) -> Iterator[Node]:
    """The calls in `graph` that hold graphs."""
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            yield node


def operator_name(node: Node) -> str:
    """What torch calls the operator of such a call."""
    return str(node.target)


def is_worked_on(node: Node) -> bool:
    """Whether passes work on the graphs of such a call."""
    return operator_name(node) in _WORKED_ON


def is_scan(node: Node) -> bool:
    """Whether `node` is a scan."""
    return operator_name(node) == "scan"


def held(gm: GraphModule, node: Node) -> dict[str, GraphModule]:
    """Name -> graph of those that `node`, a call in `gm`, holds."""
    names = [str(a.target) for a in node.args if isinstance(a, Node) and a.op == "get_attr"]
    found = {name: getattr(gm, name, None) for name in names}
    return {name: graph for name, graph in found.items() if isinstance(graph, GraphModule)}


def graphs(gm: GraphModule) -> list[GraphModule]:
    """`gm`, and all graphs that passes work on in its calls and in theirs."""
    parts = (part for call in filter(is_worked_on, subgraph_calls(gm.graph)) for part in held(gm, call).values())
    return [gm, *(graph for part in parts for graph in graphs(part))]


def inner(gm: GraphModule, call: Node) -> list[GraphModule]:
    """All graphs in `call`, those in them included."""
    found = []
    for part in held(gm, call).values():
        found += [part, *(graph for nested in subgraph_calls(part.graph) for graph in inner(part, nested))]
    return found


def all_calls(gm: GraphModule, *targets: Callable[..., Any]) -> Iterator[Node]:
    """The calls of `targets` in `gm` and in the graphs that passes work on in it."""
    return (node for part in graphs(gm) for node in calls(part.graph, *targets))


def all_nodes(gm: GraphModule) -> Iterator[Node]:
    """The nodes of `gm` and of the graphs that passes work on in it."""
    return (node for part in graphs(gm) for node in part.graph.nodes)


def operands_of(call: Node) -> list[Any]:
    """What goes to the last inputs of the graphs of such a call, if passes work on these."""
    operands = call.args[OPERANDS]
    assert isinstance(operands, (list, tuple))
    return list(operands)


def outer_operands(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """(input of a graph that passes work on, the constant or other operand that it is in the graph around it), for the
    inputs that are the same at every step of a loop."""
    for call in filter(is_worked_on, subgraph_calls(gm.graph)):
        for part in held(gm, call).values():
            inputs = part.graph.find_nodes(op="placeholder")
            pairs = zip(reversed(inputs), reversed(operands_of(call)), strict=False)
            yield from ((placeholder, operand) for placeholder, operand in pairs if isinstance(operand, Node))
            yield from outer_operands(part)


def owner(node: Node) -> GraphModule:
    """The module whose constants the graph of `node` reads."""
    module = node.graph.owning_module
    assert module is not None
    return module


def copied_graph(gm: GraphModule, nodes: dict[Node, Node] | None = None) -> GraphModule:
    """`gm` with a graph of its own, and so the graphs in it; tensors are shared.

    Args:
        nodes: gets the copy of each node.
    """
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        new.name = old.name  # FX makes `input_1` of `input`, and a signature knows the name
        if nodes is not None:
            nodes[old] = new
    result = GraphModule(gm, graph)
    for call in subgraph_calls(graph):
        for name, part in held(gm, call).items():
            setattr(result, name, copied_graph(part, nodes))
    return result
