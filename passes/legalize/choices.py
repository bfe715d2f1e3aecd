"""Which values of a graph something is chosen by: the scores of a router."""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from passes.graph import aten, calls, is_call, is_pointwise
from passes.legalize.positions import MOVING

# What routers do between their linear layer and the choice, besides pointwise operators and such as move values.
_SCORING = (
    aten.softmax.int,
    aten._softmax.default,
    aten.sum.dim_IntList,
    aten.topk.default,
    aten.scatter.src,
    aten.scatter.value,
    operator.getitem,
)


def choices(graph: Graph) -> set[Node]:
    """The calls from the linear layer of a router to the `topk` that chooses by its scores, both included.

    In float16 the sigmoids of two experts are equal for many a token, and which of them it is sent to is then anybody's
    choice. A `topk` whose indices the program only returns chooses nothing inside of it.
    """
    found: set[Node] = set()
    pending = [node for node in calls(graph, aten.topk.default) if _is_used(node)]
    while pending:
        node = pending.pop()
        if node in found or node.op != "call_function":
            continue
        if is_call(node, aten.linear.default):
            found.add(node)
        elif _scores(node):
            found.add(node)
            pending += node.all_input_nodes
    return found


def _scores(node: Node) -> bool:
    return is_pointwise(node) or is_call(node, *_SCORING, *MOVING)


def _is_used(topk: Node) -> bool:
    """Whether the program does something with the indices."""
    indices = (user for user in topk.users if is_call(user, operator.getitem) and user.args[1] == 1)
    return any(user.op != "output" for index in indices for user in index.users)
