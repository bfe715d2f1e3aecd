"""Calls that hold graphs of their own: `torch.cond`, `while_loop`, `scan`, `map`, `flex_attention`.

Such a call reads its graphs by `get_attr`, and everything that they compute with is an operand: weights, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

__all__ = ["Body", "bodies", "inner_calls", "operator_name", "subgraph_calls"]


@dataclass(frozen=True)
class Body:
    """A graph in a call.

    Attributes:
        gm: it. call: the outermost call around it. operands: what each of its inputs is outside, where that is
            one thing: a loop's state is another thing every time.
    """

    gm: GraphModule
    call: Node
    operands: Mapping[Node, Node]


def subgraph_calls(graph: Graph) -> Iterator[Node]:
    """The calls in `graph` that hold graphs."""
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            yield node


def operator_name(node: Node) -> str:
    """What torch calls the operator of such a call."""
    return str(node.target)


def bodies(gm: GraphModule) -> Iterator[Body]:
    """The graphs in the calls of `gm`, and those in them."""
    yield from _bodies(gm, {}, None)


def _bodies(gm: GraphModule, outer: Mapping[Node, Node], call: Node | None) -> Iterator[Body]:
    for node in subgraph_calls(gm.graph):
        for name, operands in _graphs(node):
            body = getattr(gm, name)
            inputs = body.graph.find_nodes(op="placeholder")
            known = {i: outer.get(o, o) for i, o in zip(inputs, operands, strict=False) if isinstance(o, Node)}
            yield Body(body, call or node, known)
            yield from _bodies(body, known, call or node)


def _graphs(node: Node) -> Iterator[tuple[str, list[object]]]:
    """(attribute of a graph, what its inputs are outside) for each graph that `node` calls."""
    kind = operator_name(node)
    graphs = [a for a in node.args if _is_graph(a)]
    groups = [list(a) if isinstance(a, (tuple, list)) else [] for a in node.args if not isinstance(a, Node)]
    if kind == "cond":
        operands = groups[0] if groups else []
    else:  # what changes from step to step comes first, what stays comes last
        operands = [None for group in groups[:-1] for _ in group] + (groups[-1] if groups else [])
    for graph in graphs:
        assert isinstance(graph, Node)
        yield str(graph.target), operands


def _is_graph(argument: object) -> bool:
    return isinstance(argument, Node) and argument.op == "get_attr" and "val" not in argument.meta


def inner_calls(gm: GraphModule, targets: Iterable[object]) -> Iterator[tuple[Node, Body]]:
    """The calls of `targets` in the graphs that `gm` holds, and which graph each is in."""
    wanted = set(targets)
    for body in bodies(gm):
        for node in body.gm.graph.nodes:
            if node.op == "call_function" and node.target in wanted:
                yield node, body
