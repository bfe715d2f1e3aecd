"""What a graph computes of constants alone: which nodes have one value, and that value."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.constants import constant
from passes.dependence import fixed_nodes, metadata_operand, value_operands
from passes.graph import ancestors, shape, val

__all__ = ["computable_nodes", "evaluate", "needed_for"]


def computable_nodes(gm: GraphModule) -> dict[Node, None]:
    """The nodes that have one value, in the order of the graph: no input reaches them, and no dynamic size."""
    fixed, found = fixed_nodes(gm), dict[Node, None]()
    for node in gm.graph.nodes:
        like = metadata_operand(node)
        static = _is_static(node) and (like is None or _is_static(like))
        if node in fixed and static and found.keys() >= set(value_operands(node)):
            found[node] = None
    return found


def _is_static(node: Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return len(tensors) == len(leaves) > 0 and all(isinstance(size, int) for t in tensors for size in t.shape)


def needed_for(wanted: Iterable[Node]) -> set[Node]:
    """`wanted`, and all of which it reads the values."""
    return ancestors(wanted, value_operands)


def evaluate(gm: GraphModule, computable: Iterable[Node], wanted: Collection[Node]) -> dict[Node, torch.Tensor]:
    """The values of `wanted`, which are among `computable`, made by the operators of the graph."""
    needed = needed_for(wanted)
    values: dict[Node, Any] = {}
    for node in computable:
        if node not in needed:
            continue
        if (stored := constant(gm, node)) is not None:
            values[node] = stored.detach()
            continue
        like = metadata_operand(node)
        if like is not None:  # its values do not matter
            values.setdefault(like, torch.empty((), dtype=val(like).dtype, device=val(like).device).expand(shape(like)))
        args, kwargs = pytree.tree_map_only(Node, values.__getitem__, (node.args, node.kwargs))
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # of a call_function
    return {node: values[node] for node in wanted}
