"""What the values of a tensor depend on: which user inputs, or none at all.

Sizes are no values: a tensor that is made in the size of an input, or expanded to it, is as fixed as a parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import aten
from passes.randomness import draws
from passes.subgraphs import operator_name

__all__ = ["fixed_nodes", "input_dependence", "metadata_operand", "same_value", "value_operands"]

# Operators that take the shape, dtype or device of one argument, the index of which is here, and ignore its values.
_READS_METADATA: Mapping[object, int] = {
    **dict.fromkeys(
        (
            aten.sym_size.int,
            aten.sym_stride.int,
            aten.sym_numel.default,
            aten.new_empty.default,
            aten.new_ones.default,
            aten.new_zeros.default,
            aten.new_full.default,
            aten.empty_like.default,
            aten.ones_like.default,
            aten.zeros_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.fill.Scalar,
            aten.fill.Tensor,
            aten.copy.default,
        ),
        0,
    ),
    **dict.fromkeys((aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default), 1),
}


def metadata_operand(node: Node) -> Node | None:
    """The operand of which `node` reads no values; None if it reads those of all."""
    index = _READS_METADATA.get(node.target) if node.op == "call_function" else None
    if index is None:
        return None
    operand, others = node.args[index], (*node.args[:index], *node.args[index + 1 :])
    return operand if isinstance(operand, Node) and operand not in others else None


def value_operands(node: Node) -> list[Node]:
    """The operands whose values `node` reads."""
    skipped = metadata_operand(node)
    return [operand for operand in node.all_input_nodes if operand is not skipped]


def input_dependence(gm: GraphModule) -> list[set[str]]:
    """For each output, the names of the user inputs whose values it depends on (their sizes do not count)."""
    reached: dict[Node, set[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            reached[node] = {node.name}
        else:
            reached[node] = set().union(*(reached[operand] for operand in _needed(node)))
    results = gm.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    return [reached[result] if isinstance(result, Node) else set() for result in results]


def _needed(node: Node) -> list[Node]:
    """`value_operands`, but that the sums and largest scores of flex_attention need no values."""
    call = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
    if not isinstance(call, Node) or operator_name(call) != "flex_attention" or node.args[1] == 0:
        return value_operands(node)
    value = call.args[2]
    others = pytree.arg_tree_leaves(*(operand for index, operand in enumerate(call.args) if index != 2))
    needed = {operand for operand in others if isinstance(operand, Node)}
    return [operand for operand in call.all_input_nodes if operand is not value or operand in needed]


def fixed_nodes(gm: GraphModule) -> set[Node]:
    """The nodes whose values are the same at every call, for inputs of one size: no input reaches them.

    They are made of weights, buffers, numbers and sizes. What is drawn at random, what a program writes to, and
    operators with a graph of their own are none.
    """
    fixed: set[Node] = set()
    for node in gm.graph.nodes:
        if _is_repeatable(node) and fixed.issuperset(value_operands(node)):
            fixed.add(node)
    return fixed


def same_value(a: Node, b: Node) -> bool:
    """Whether two nodes are certain to have the same value: one node, or one computation of the same operands."""
    if a is b:
        return True
    if a.op != b.op or a.target != b.target or not _is_repeatable(a):
        return False
    (operands, tree), (others, other_tree) = (pytree.tree_flatten((node.args, node.kwargs)) for node in (a, b))
    return tree == other_tree and all(
        same_value(m, n) if isinstance(m, Node) and isinstance(n, Node) else m == n
        for m, n in zip(operands, others, strict=True)
    )


def _is_repeatable(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"
    if isinstance(node.target, torch._ops.OpOverload):
        return not (draws(node) or node.target._schema.is_mutable)
    return node.target is operator.getitem or isinstance(node.meta.get("val"), int | float | torch.SymInt)
