"""What a narrower dtype cannot hold: which constants, and which values are masks, whose size means nothing."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from passes.constants import constant, is_constant_expression, root_constants, scalar
from passes.graph import argument, aten, is_call
from passes.ir import ATTENTION
from passes.sdpa import SDPA, SOFTMAXES
from passes.traits import SAME_ELEMENTS

__all__ = ["SAME_ELEMENTS", "before_softmax", "beyond", "is_passing", "largest", "least", "may_mask", "softmax_axis"]

_RESHAPING = (
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
)
# What puts a number in the place of scores.
_REPLACING = (aten.where.self, aten.masked_fill.Tensor, aten.maximum.default)
# What stands between a product, the mask and the softmax, the score of a sink and the largest score among it.
_MASKING = (
    *(*_RESHAPING, *_REPLACING, aten.masked_fill.Scalar, aten.add.Tensor, aten.clamp.default, aten._to_copy.default),
    *(aten.view.default, aten.clone.default, aten.cat.default, aten.sub.Tensor),
    *(aten.amax.default, aten.max.dim, operator.getitem),
)
# No element is larger than the largest of the operands.
_PASSING = (
    *(*SAME_ELEMENTS, *_REPLACING, *SOFTMAXES, SDPA, aten._to_copy.default, operator.getitem, aten.repeat.default),
    *(aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.index_select.default, aten.embedding.default),
    *(aten.gather.default, aten.cat.default, aten.stack.default, aten.roll.default, aten.flip.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.unfold.default),
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.leaky_relu.default, aten.sin.default, aten.cos.default, aten.neg.default, aten.abs.default),
    *(aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
)


def beyond(target: torch.dtype) -> str:
    """What to say of a number that `target` does not hold, and the way out."""
    return (
        f"{target} ends at {torch.finfo(target).max:.5g}; compute in bfloat16 or float32 (dtype=torch.bfloat16,"
        " or --dtype bfloat16 on the command line)"
    )


def least(gm: GraphModule, node: Node) -> float | None:
    """The smallest number in a constant expression, or in what is one number everywhere; None of what is computed."""
    if not is_constant_expression(node):
        return scalar(gm, node)
    return min((float(values.min()) for values in _floats(gm, node)), default=0.0)


def largest(gm: GraphModule, node: Node) -> float:
    """The largest magnitude of a finite number in the constants that a constant expression is made of."""
    found = 0.0
    for values in _floats(gm, node):
        low, high = torch.aminmax(values)
        if not bool(torch.isfinite(low) and torch.isfinite(high)):
            values = torch.where(values.isfinite(), values, 0)
            low, high = torch.aminmax(values)
        found = max(found, -float(low), float(high))
    return found


def _floats(gm: GraphModule, node: Node) -> list[torch.Tensor]:
    tensors = (constant(gm, root) for root in root_constants(node))
    return [t.detach() for t in tensors if t is not None and t.is_floating_point() and t.numel()]


def is_passing(node: Node) -> bool:
    """Whether no element of what `node` makes is larger than those of its operands, or than 1."""
    return is_call(node, *_PASSING)


def before_softmax(graph: Graph) -> set[Node]:
    """The calls that only a softmax reads, an attention as its mask, or what orders them for the places alone, through
    nothing but masks and views: there a large negative number hides."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.users and all(_hides(node, user, found) for user in node.users):
            found.add(node)
    return found


def _hides(node: Node, user: Node, found: set[Node]) -> bool:
    if is_call(user, SDPA, ATTENTION):
        return node not in user.args[:3] and user.args[3:4] == (node,)
    return is_call(user, *SOFTMAXES) or _gives_places(user) or (user in found and is_call(user, *_MASKING))


def _gives_places(node: Node) -> bool:
    """Whether `node` orders its operand, and no more than the places of the elements is read."""
    if is_call(node, aten.argmax.default, aten.argsort.default, aten.argsort.stable):
        return True
    ordered = is_call(node, aten.topk.default, aten.sort.default, aten.sort.stable)
    return ordered and all(is_call(user, operator.getitem) and user.args[1] == 1 for user in node.users)


def softmax_axis(node: Node) -> int | None:
    """The axis that a softmax takes `node` along; None if none reads it directly."""
    return next((int(argument(user, "dim")) for user in node.users if is_call(user, *SOFTMAXES)), None)


def may_mask(operand: Node, user: Node, computed: bool) -> bool:
    """Whether `operand`, reshaped or not, could be the additive mask of an attention.

    What is added elsewhere counts only if it was `computed` from sizes, or is a buffer: a bias, or an input that is
    added, is data.
    """
    if is_call(user, SDPA, ATTENTION):
        return len(user.args) > 3 and user.args[3] is operand
    if is_call(user, *_RESHAPING, aten.masked_fill.Scalar):
        return any(may_mask(user, other, computed) for other in user.users)
    return computed and is_call(user, aten.add.Tensor, *_REPLACING)
