"""Read what an eager attention does with its probabilities before they meet the value.

Used by `NormalizeAttention`: what a row of probabilities is multiplied by goes behind the attention, and zeros where a
mask of the scores hides a key, or where all keys are hidden, are what attention with a boolean mask gives anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from passes.constants import is_constant_expression, scalar
from passes.graph import Emitter, argument, aten, dtype, is_call, is_pointwise, only_user, shape, strip
from passes.normalize.attention_layout import is_one, same
from passes.normalize.attention_scores import (
    ADDED,
    MATMULS,
    RESHAPES,
    Mask,
    NotUnderstood,
    is_copy,
    is_float_cast,
    swaps,
)
from passes.normalize.mask_simplifier import unexpanded

__all__ = ["Probabilities", "lies_between_products", "read_probabilities"]

_SWAPS = (aten.transpose.int, aten.permute.default)
_MOVING = (
    *(aten._to_copy.default, aten.where.self, aten.where.ScalarOther, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.expand.default, *_SWAPS),
)
_MIXING = (
    *(aten.slice.Tensor, aten.select.int, aten.cat.default, aten.sum.dim_IntList, aten.layer_norm.default),
    *(aten.linear.default, aten.convolution.default, aten.native_dropout.default, operator.getitem),
)


@dataclass
class Probabilities:
    """How probabilities become an operand of `product`.

    Attributes:
        product: the matrix product with the value.
        value: its other operand.
        transposed: the product is that of the transposes, `matmul(v^T, p^T)`.
        zeroed: masks that set probabilities to zero; true where visible, or the reverse if negated.
        factors: what whole rows are multiplied by: numbers, or tensors with one column.
    """

    product: Node
    value: Node
    transposed: bool = False
    zeroed: list[Mask] = field(default_factory=list)
    factors: list[Node | float] = field(default_factory=list)

    def check(self, masks: Collection[Mask]) -> None:
        """Raises NotUnderstood where `zeroed` has a mask that the scores do not have."""
        for zeroed in self.zeroed:
            if not any(m.negated == zeroed.negated and _equal(unexpanded(m.node), zeroed.node) for m in masks):
                raise NotUnderstood(f"{zeroed.node.name} sets probabilities to zero that the scores do not hide")

    def finished(self, result: Node, emit: Emitter) -> Node:
        """What the product makes, from the attention's `result`."""
        for factor in self.factors:
            result = emit(aten.mul.Tensor, result, factor)
        if dtype(result) is not dtype(self.product):  # probabilities were cast behind a factor
            result = emit(aten._to_copy.default, result, dtype=dtype(self.product))
        return emit(aten.transpose.int, result, -1, -2) if self.transposed else result


def read_probabilities(gm: GraphModule, softmax: Node, *, transposed: bool) -> Probabilities | None:
    """What happens to the probabilities `softmax`; None if it is not what attention does with them.

    `transposed` says that they go over the last axis but one.
    """
    found = Probabilities(softmax, softmax)
    node = softmax
    while (user := only_user(node)) is not None and _is_tensor(user):
        if is_call(user, *MATMULS):
            place = 1 if transposed else 0
            value = user.args[1 - place]
            if user.args[place] is not node or value is node or not isinstance(value, Node):
                return None
            if found.factors and not same(shape(node)[:-2], shape(user)[:-2]):
                return None
            found.product, found.value, found.transposed = user, value, transposed
            return found
        if swaps(user):
            transposed = not transposed
        elif not (_hands_on(user) or (not transposed and _changes(gm, user, node, found))):
            return None
        elif found.factors and is_call(user, *RESHAPES):
            return None  # the factors have the axes of before
        node = user
    return None


def _hands_on(node: Node) -> bool:
    """Whether `node` makes the same probabilities in another dtype, memory layout or leading shape."""
    if is_call(node, *RESHAPES):
        return same(shape(node)[-2:], shape(node.args[0])[-2:])  # type: ignore[arg-type]  # a reshape's input is a node
    return is_copy(node) or is_float_cast(node)


def _changes(gm: GraphModule, user: Node, node: Node, found: Probabilities) -> bool:
    """Whether `user` does to the probabilities `node` what attention can do, too; noted in `found`."""
    if not same(shape(user), shape(node)) or dtype(user) != dtype(node):
        return False
    if is_call(user, aten.nan_to_num.default):  # rows of which all is hidden: attention gives zeros, too
        return argument(user, "nan") in (None, 0.0)
    if is_call(user, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        mask, value = user.args[1:]
        return user.args[0] is node and scalar(gm, value) == 0.0 and _zeroed(mask, found, negated=True)
    if is_call(user, aten.where.self, aten.where.ScalarOther):
        mask, kept, value = user.args
        return kept is node and scalar(gm, value) == 0.0 and _zeroed(mask, found, negated=False)
    if not is_call(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return False
    divides = is_call(user, aten.div.Tensor, aten.div.Scalar)
    left, right = user.args[:2]
    factor = right if left is node else left
    if factor is node or (divides and left is not node):
        return False
    number = scalar(gm, factor)
    if number is not None and number != 0:
        found.factors.append(1 / number if divides else number)
        return True
    if not isinstance(factor, Node) or divides:
        return False
    source = strip(factor, aten._to_copy.default)
    if dtype(source) is torch.bool:
        return _zeroed(source, found, negated=False)
    if dtype(factor) == dtype(node) and is_one((1, *shape(factor))[-1]):
        found.factors.append(factor)
        return True
    return False


def _zeroed(mask: object, found: Probabilities, *, negated: bool) -> bool:
    if not isinstance(mask, Node):
        return False
    found.zeroed.append(Mask(unexpanded(mask), shape(mask), negated=negated))
    return True


def _equal(a: object, b: object) -> bool:
    """Whether two nodes are one, or the same operators on the same inputs."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(_equal, a, b))
        return bool(a == b)
    if a is b:
        return True
    return (
        a.op == b.op
        and a.op in ("call_function", "get_attr")
        and a.target == b.target
        and _equal(a.args, b.args)
        and a.kwargs == b.kwargs
    )


def lies_between_products(node: Node, *, closely: bool = False) -> bool:
    """Whether `node` is made of a matrix product of activations, and a matrix product is made of it, in few steps.

    Args:
        closely: what lies between only keeps or changes elements of `[..., S, T]` one by one; else heads may be mixed,
            elements added and left out, and operands of the products be constant.
    """
    size = shape(node)[-2:]

    def leads(other: Node) -> bool:
        return _leads_on(other) and not (closely and (is_call(other, *_MIXING) or not _same_matrix(shape(other), size)))

    before = _connected(node, lambda n: n.all_input_nodes[:2], leads)
    behind = _connected(node, lambda n: n.users, leads)

    def is_product(other: Node) -> bool:
        return is_call(other, *MATMULS, *ADDED) and not (closely and any(map(is_constant_expression, other.args[-2:])))

    return any(map(is_product, before)) and any(map(is_product, behind))


def _connected(
    node: Node, neighbours: Callable[[Node], Iterable[Node]], leads: Callable[[Node], bool], steps: int = 16
) -> set[Node]:
    """What `steps` lead to from `node`, each but the last over a node that `leads`."""
    found, last = set[Node](), [node]
    for _ in range(steps):
        last = [*{other for n in last if n is node or leads(n) for other in neighbours(n)}.difference(found)]
        found.update(last)
    return found


def _same_matrix(a: torch.Size, b: torch.Size) -> bool:
    return same(a[-2:], b) or same(a[-2:], b[::-1])


def _leads_on(node: Node) -> bool:
    """Whether `node` keeps elements apart, moves them, or mixes heads."""
    if is_call(node, aten.linear.default):
        return is_call(node.args[0], *_SWAPS)
    return is_call(node, aten.native_dropout.default, operator.getitem) or (
        _is_tensor(node) and (is_pointwise(node) or is_call(node, *_MOVING, *_MIXING, *RESHAPES) or is_copy(node))
    )


def _is_tensor(node: Node) -> bool:
    """Whether `node` makes one tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
