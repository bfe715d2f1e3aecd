"""Both operands of a linear layer are rotated by a Hadamard matrix."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant, is_constant_expression
from passes.graph import Emitter, aten, calls, dtype, following, is_call, shape, strip
from passes.hadamard import HADAMARD, Rotation, activation_factor, rotation_for
from passes.ir import BATCHED_LINEAR

FACTOR = "hadamard_"
"""What the names of the factors begin with."""


class RotateLinears(Pass):
    """Rotate the input and the weight of the linear layers that were chosen.

    Before:
        y = linear(x, w, b)                                             # x [..., K]
    After, for a K with a Hadamard matrix of order K = l * r (of order r, if K is small or has blocks):
        r = reshape(matmul(h_l, matmul(reshape(x, [..., l, r]), h_r)), [..., K])
        r = reshape(matmul(reshape(x, [..., K / r, r]), h_r), [..., K])
        y = linear(r, hadamard(w), b)

    Requires: weights as constant expressions; nothing is quantized yet, so that calibration sees the rotated tensors.
        `FoldWeights` (or `FoldConstants`, of a weight that stays in floats) evaluates the `hadamard`.
    Ensures: the same product, within rounding; both operands are rotated or neither. The linear layer is the same node,
        consumers of one tensor share its rotation, and each factor is one constant for the whole graph. Other users of
        the input or the weight, a tied embedding for one, keep the original.
    Declines when: the order of no Hadamard matrix, from 4 on, divides K; the weight is no constant expression; or the
        input is one, as folding would make a constant of its rotation.
    Why: an outlier is spread over its block, so fewer small values are lost to its scale. The factors have entries
        +-2^-j, exact in half precision; what is left of 1/n is folded into the weight.
    """

    def __init__(self, consumers: Collection[Node]) -> None:
        """`consumers` holds the calls of `aten.linear` and `qcompile::batched_linear` that a recipe rotates."""
        super().__init__()
        self.consumers = consumers

    def rewrite(self, gm: GraphModule) -> None:
        inputs: dict[Node, Node] = {}
        weights: dict[Node, Node] = {}
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            x, weight = node.args[:2]
            assert isinstance(x, Node) and isinstance(weight, Node)
            if node not in self.consumers or is_call(strip(weight, aten._to_copy.default), HADAMARD):
                continue
            rotation = rotation_for(int(shape(weight)[-1]))
            if rotation is None:
                self.decline(f"the order of no Hadamard matrix, from 4 on, divides {shape(weight)[-1]}", node)
                continue
            if reason := _unfit(x, weight):
                self.decline(reason, node)
                continue
            if x not in inputs:
                inputs[x] = _rotate(gm, x, rotation, node)
            if weight not in weights:
                weights[weight] = _rotate_weight(weight, node)
            node.update_arg(0, inputs[x])
            node.update_arg(1, weights[weight])
            self.fire()


def _unfit(x: Node, weight: Node) -> str | None:
    """Why the product of `x` and `weight` cannot be rotated, or None."""
    if not is_constant_expression(weight):
        return "the weight is not a constant, so it cannot be rotated ahead of time"
    if is_constant_expression(x):
        return "the input is a constant, whose rotation would be folded away"
    return None


def _rotate(gm: GraphModule, x: Node, rotation: Rotation, like: Node) -> Node:
    """`x` rotated along its last axis, right behind it, so that it stands before all readers of `x`."""
    right = _factor(gm, rotation.right, dtype(x))
    left = _factor(gm, rotation.left, dtype(x)) if rotation.left > 1 else None
    before = following(x)
    while before.op == "get_attr":  # an input of the program comes before the factors
        before = before.next
    emit = Emitter(before, like=like)
    blocked = len(rotation.blocked_shape) > 1
    sizes = emit.sizes(x) if blocked else []
    result = emit(aten.reshape.default, x, [*sizes[:-1], *rotation.blocked_shape]) if blocked else x
    result = emit(aten.matmul.default, result, right)
    if left is not None:
        result = emit(aten.matmul.default, left, result)
    return emit(aten.reshape.default, result, sizes) if blocked else result


def _rotate_weight(weight: Node, consumer: Node) -> Node:
    """`weight` rotated, in its own dtype, before `consumer`, the first of its readers."""
    emit = Emitter(consumer)
    rotated = emit(HADAMARD, weight)
    return rotated if dtype(weight) == torch.float32 else emit(aten._to_copy.default, rotated, dtype=dtype(weight))


def _factor(gm: GraphModule, order: int, to: torch.dtype) -> Node:
    """The constant that activations in `to` are multiplied by: one for the whole graph, before the first call."""
    name, value = f"{FACTOR}{order}", activation_factor(order, to)
    anchor = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in gm.graph.find_nodes(op="get_attr"):
        found = constant(gm, node) if str(node.target).startswith(name) and node < anchor else None
        if found is not None and found.dtype == to and torch.equal(found, value):
            assert isinstance(node, Node)
            return node
    return add_constant(gm, name, value, anchor)
