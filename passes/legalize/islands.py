"""What stays in the model's dtype where the rest of a graph computes in a narrower one."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, constant
from passes.graph import aten, calls, is_call, val
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.legalize.half_kernels import lacks_half_kernel
from passes.traits import is_complex

__all__ = ["global_scales", "of_their_own", "without_half_kernel"]

_QUANTIZERS = (QUANTIZE, DYNAMIC_QUANTIZE, DEQUANTIZE, operator.getitem)


def without_half_kernel(gm: GraphModule) -> set[Node]:
    """The calls that half precision has no kernel for, and all that make or read complex numbers: torch has complex
    halves in name, and hardly an operator for them. Casts for these calls alone belong to them."""
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op != "call_function":
            continue
        cast = is_call(node, aten._to_copy.default) and bool(node.users) and all(user in found for user in node.users)
        if cast or lacks_half_kernel(node) or is_complex(node) or any(map(is_complex, node.all_input_nodes)):
            found.add(node)
    return found


def global_scales(gm: GraphModule, source: torch.dtype) -> set[Node]:
    """What turns an amax that is measured at run time into a global scale, in float32: a half would round it to 0."""
    found: set[Node] = set()
    pending = [node.args[1] for node in calls(gm.graph, DYNAMIC_QUANTIZE)]
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node.op != "call_function" or is_call(node, aten.amax.default):
            continue
        if val(node).dtype == source and not val(node).ndim:
            found.add(node)
            pending += node.all_input_nodes
    return found


def of_their_own(gm: GraphModule, exact: set[Node]) -> set[Node]:
    """The quantizers in front of the linear layers in `exact`, which they share with no layer outside of it.

    A layer in float32 wants operands that are dequantized to float32: a Cast between the two would be in the way of
    its GEMM. Where others read the same pair (a router and its experts read one tensor) the layer gets a copy.
    """
    found: set[Node] = set()
    for linear in [node for node in calls(gm.graph, aten.linear.default) if node in exact]:
        for index in (0, 1):
            pair = linear.args[index]
            if isinstance(pair, Node) and is_call(pair, DEQUANTIZE):
                if not all(user in exact for user in pair.users):
                    pair = _copied(gm, pair, linear)
                    linear.update_arg(index, pair)
                found.update(_quantizers(pair))
    return found


def _quantizers(node: Node) -> Iterator[Node]:
    """`node` and the quantizers before it, up to the tensor that they quantize."""
    if is_call(node, *_QUANTIZERS):
        if not is_call(node, QUANTIZE, DYNAMIC_QUANTIZE):
            for operand in node.all_input_nodes:
                yield from _quantizers(operand)
        yield node


def _copied(gm: GraphModule, pair: Node, before: Node) -> Node:
    """`pair` again with scales of its own, for `before` alone."""
    quantizers = list(dict.fromkeys(_quantizers(pair)))
    copies: dict[Node, Node] = {}
    for node in quantizers:
        for scale in node.all_input_nodes:
            if is_call(node, DEQUANTIZE, QUANTIZE, DYNAMIC_QUANTIZE) and scale in node.args[1:] and scale not in copies:
                tensor = constant(gm, scale)
                if tensor is not None:
                    copies[scale] = add_constant(gm, str(scale.target), tensor, before)
        with gm.graph.inserting_before(before):
            copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
    return copies[pair]
