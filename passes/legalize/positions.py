"""Which values of a graph are positions: what angles, and float numbers that become integers, are computed from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from passes.graph import aten, dtype, is_call, is_pointwise, val

__all__ = ["is_periodic", "positions"]

MOVING = (
    aten._to_copy.default,
    aten.cat.default,
    aten.expand.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.transpose.int,
    aten.unsqueeze.default,
)
_PRODUCTS = (aten.bmm.default, aten.einsum.default, aten.matmul.default, aten.mm.default)  # of position and frequency


def is_periodic(node: Node) -> bool:
    """Whether `node` is a sine or cosine: its values are small, and how exact they are depends on its input."""
    return is_call(node, aten.sin.default, aten.cos.default)


def positions(graph: Graph, parameters: Collection[Node], narrowest: torch.dtype) -> set[Node]:
    """The calls that lead to a sine, a cosine or a cast to integers in `narrowest` or a wider dtype, and those.

    From there backwards over elementwise operators and such as move values: a value that no parameter goes into is a
    position if any of its users is one (a timestep, a coordinate); one that a parameter goes into if all of them are
    (a learned frequency times a timestep), so that the data of a periodic activation is none.

    Args:
        parameters: every node that depends on a parameter.
    """
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        users = [user in found for user in node.users]
        leads = any(users) if node not in parameters else bool(users) and all(users)
        if _needs_precision(node, narrowest) or (leads and _keeps_values_apart(node, node in parameters)):
            found.add(node)
    return found


def _needs_precision(node: Node, narrowest: torch.dtype) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    if not dtype(source).is_floating_point or torch.finfo(dtype(source)).eps > torch.finfo(narrowest).eps:
        return False
    to = val(node).dtype
    return is_periodic(node) or (is_call(node, aten._to_copy.default) and _is_integer(to))


def _is_integer(to: torch.dtype) -> bool:
    return not (to.is_floating_point or to.is_complex or to is torch.bool)


def _keeps_values_apart(node: Node, learned: bool) -> bool:
    """Whether `node` computes each element of its result from few others, and not from a whole row of data."""
    return is_pointwise(node) or is_call(node, *MOVING) or (not learned and is_call(node, *_PRODUCTS))
