"""Read what an eager attention adds to, multiplies with and hides from `q k^T` before its softmax.

Used by `NormalizeAttention`: `read_scores` walks up from the softmax's input to the matrix product and collects what it
passes, so that the order in which a model scales, masks and casts does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from passes.constants import scalar
from passes.graph import argument, aten, dtype, is_call, only_user, shape
from passes.normalize.attention_layout import same
from passes.randomness import draws
from passes.sdpa import HIDDEN

__all__ = [
    "ADDED",
    "MATMULS",
    "RESHAPES",
    "Mask",
    "NotUnderstood",
    "Scores",
    "is_copy",
    "is_float_cast",
    "leads_to_product",
    "read_scores",
    "swaps",
    "unscaled",
]

MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
ADDED = (aten.baddbmm.default, aten.addmm.default)
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.dropout.default)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)
_WHERE = (aten.where.self, aten.where.ScalarOther)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


class NotUnderstood(Exception):
    """The graph between a matrix product and a softmax is not an attention's; the message says what was met."""


@dataclass(frozen=True)
class Mask:
    """Something that changes scores of shape `frame`: added after multiplication with `factor`, or hiding keys.

    `node` is added if it is of floating point; else it says which keys a query sees, or, `negated`, which it does not.
    """

    node: Node
    frame: torch.Size
    factor: float = 1.0
    negated: bool = False


@dataclass
class Scores:
    """`scale * product + masks`, where `product` is the matrix product `q k^T`, or its transpose `k q^T` if `swapped`.

    On the way it is reshaped by `reshapes`.
    """

    product: Node
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    reshapes: list[Node] = field(default_factory=list)
    swapped: bool = False


def read_scores(gm: GraphModule, scores: Node, *, swapped: bool = False) -> Scores:
    """What the softmax input `scores` is made of.

    Args:
        swapped: the softmax goes over the last axis but one: `scores` are transposed.

    Raises:
        NotUnderstood: an operator is none that attention uses, or somebody else reads a value on the way.
    """
    factor = 1.0
    masks: list[Mask] = []
    reshapes: list[Node] = []

    def masked(mask: Mask, before: Node) -> Node:
        if swapped:
            raise NotUnderstood(f"{mask.node.name} is a mask of transposed scores")
        if not same(mask.frame[-2:], shape(before)[-2:]):
            raise NotUnderstood(f"{mask.node.name} broadcasts the scores to another shape")
        masks.append(mask)
        return before

    node = scores
    while not is_call(node, *MATMULS, *ADDED):
        if only_user(node) is None:
            raise NotUnderstood(f"the attention scores {node.name} have another user")
        if is_copy(node) or is_float_cast(node):
            node = _input(node, 0)
        elif swaps(node):
            node, swapped = _input(node, 0), not swapped
        elif is_call(node, *RESHAPES) and same(shape(node)[-2:], shape(_input(node, 0))[-2:]):
            reshapes.append(node)
            node = _input(node, 0)
        elif is_call(node, *_MULTIPLY, *_DIVIDE):
            node, number = _scaled(gm, node)
            factor *= number
        elif is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
            scored, mask = _split_sum(node)
            node = masked(Mask(mask, shape(node), factor), scored)
        elif is_call(node, *_WHERE):
            _check_hides(gm, node.args[2], factor)
            node = masked(Mask(_input(node, 0), shape(node)), _input(node, 1))
        elif is_call(node, *_FILL):
            _check_hides(gm, node.args[2], factor)
            node = masked(Mask(_input(node, 1), shape(node), negated=True), _input(node, 0))
        else:
            raise NotUnderstood(f"{node.target} between the product of query and key and the softmax")
    if only_user(node) is None:
        raise NotUnderstood(f"the attention scores {node.name} have another user")
    if is_call(node, *ADDED):
        if argument(node, "beta") != 0:  # else what is added is not read
            masked(Mask(_input(node, 0), shape(node), factor * argument(node, "beta")), node)
        factor *= argument(node, "alpha")
    return Scores(node, factor, masks, reshapes, swapped)


def unscaled(gm: GraphModule, node: Node) -> tuple[Node, float]:
    """`node` before it was multiplied with a number, and that number."""
    factor = 1.0
    while is_copy(node) or is_call(node, *_MULTIPLY, *_DIVIDE):
        if is_copy(node):
            node = _input(node, 0)
            continue
        try:
            source, number = _scaled(gm, node)
        except NotUnderstood:  # multiplied with a tensor: part of what the query is
            break
        if dtype(source) is not dtype(node):
            break
        node, factor = source, factor * number
    return node, factor


def _scaled(gm: GraphModule, node: Node) -> tuple[Node, float]:
    """The tensor that `node` multiplies with a number or divides by one, and the factor."""
    left, right = node.args[:2]
    number = scalar(gm, right)
    if number is None and is_call(node, *_MULTIPLY):
        left, number = right, scalar(gm, left)
    if number is None or not isinstance(left, Node) or not same(shape(left), shape(node)):
        raise NotUnderstood(f"{node.name} scales by something that is not a constant number")
    if number == 0:
        raise NotUnderstood(f"{node.name} scales by zero")
    return left, number if is_call(node, *_MULTIPLY) else 1 / number


def _split_sum(node: Node) -> tuple[Node, Node]:
    """The summand of `node` that is the scores, and the one that is a mask."""
    summands = node.args[:2]
    for scores, mask in (summands, summands[::-1]):
        if isinstance(scores, Node) and isinstance(mask, Node) and leads_to_product(scores):
            if not same(shape(scores), shape(node)):
                raise NotUnderstood(f"{mask.name} broadcasts the scores to another shape")
            if not dtype(mask).is_floating_point:
                raise NotUnderstood(f"{mask.name} is added to the scores and is not of floating point")
            return scores, mask
    raise NotUnderstood(f"neither summand of {node.name} is a product of query and key")


def is_copy(node: Node) -> bool:
    """Whether `node` hands its input on; dropout does, where it is not switched on."""
    return is_call(node, *_COPIES) and not draws(node)


def swaps(node: Node) -> bool:
    """Whether `node` swaps the last two axes."""
    rank = len(shape(node))
    last = [*range(rank - 2), rank - 1, rank - 2]
    if is_call(node, aten.transpose.int):
        return {int(axis) % rank for axis in node.args[1:]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    return is_call(node, aten.permute.default) and [axis % rank for axis in node.args[1]] == last  # type: ignore[union-attr, operator]


def leads_to_product(node: Node) -> bool:
    """Whether a walk up from `node`, through what changes scores, ends at a matrix product."""
    while not is_call(node, *MATMULS, *ADDED):
        if is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.cat.default, *_MULTIPLY):  # some side of a softcap
            return any(leads_to_product(side) for side in node.all_input_nodes)
        if not is_call(node, *_COPIES, *RESHAPES, *_DIVIDE, *_FILL, *_WHERE, aten._to_copy.default) and not swaps(node):
            return False
        source = node.args[1] if is_call(node, *_WHERE) else node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    return True


def _check_hides(gm: GraphModule, value: object, factor: float) -> None:
    number = scalar(gm, value)
    if number is None or not number * factor <= HIDDEN:  # nor a NaN
        raise NotUnderstood("scores are replaced by something that is not a very negative number")


def is_float_cast(node: Node) -> bool:
    """Whether `node` casts from one floating-point dtype to another, neither of which rounds as codes do."""
    return is_call(node, aten._to_copy.default) and all(
        to.is_floating_point and to.itemsize > 1 for to in (dtype(node), dtype(_input(node, 0)))
    )


def _input(node: Node, index: int) -> Node:
    source = node.args[index]
    if not isinstance(source, Node):
        raise NotUnderstood(f"{node.name} has a number for an input")
    return source
