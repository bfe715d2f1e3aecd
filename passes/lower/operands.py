"""What a product of codes wants of a layer, and replacing the constants that it is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, delete_constant, evaluate_constant, root_constants
from passes.reading import QuantizedLayer


def misaligned(linear: QuantizedLayer, k: int, n: int) -> str | None:
    """Why a product wants other sizes than those of `linear`, where K is to be a multiple of `k` and N of `n`."""
    rows, columns = linear.sizes
    for letter, size, multiple in (("K", columns, k), ("N", rows, n)):
        if size % multiple:
            return f"{letter} = {size} is no multiple of {multiple}"
    return None


def constant_like(
    gm: GraphModule, before: Node, expression: Node, convert: Callable[[torch.Tensor], torch.Tensor]
) -> Node:
    """A new constant made of the constant `expression` by `convert`, placed before `before` and called alike."""
    root = root_constants(expression)[0]
    return add_constant(gm, str(root.target), convert(evaluate_constant(gm, expression)), before)


def constants_read(gm: GraphModule) -> set[str]:
    """Names of the constants that the graph reads."""
    return {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}


def forget_unread(gm: GraphModule, before: set[str]) -> None:
    """Unregister those of the constants `before` that nothing reads any more."""
    gm.graph.eliminate_dead_code()
    for name in sorted(before - constants_read(gm)):
        delete_constant(gm, name)
