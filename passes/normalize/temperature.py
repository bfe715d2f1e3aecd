"""A learned temperature of attention scores goes to the query."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.base import Pass
from passes.constants import scalar
from passes.graph import Emitter, aten, calls, dtype, is_call, only_user, shape, strip
from passes.ir import DEQUANTIZE
from passes.normalize.attention_layout import is_one, same
from passes.normalize.attention_scores import MATMULS
from passes.sdpa import SOFTMAXES
from passes.traits import SAME_ELEMENTS

__all__ = ["TemperatureToQuery"]

_SCALES = (aten.mul.Tensor, aten.div.Tensor)
# What stands between the scores and their softmax.
_MASKING = (
    *(aten.add.Tensor, aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.mul.Tensor, aten.div.Tensor, aten.reshape.default, aten._to_copy.default, aten.dropout.default),
)


class TemperatureToQuery(Pass):
    """Multiply queries, and not the scores that they give, with a tensor that has one number for each of them or fewer.

    Before, Swin v2, XCiT, Restormer (`t` [H,1,1], learned):
        softmax(add(mul(matmul(q[B,H,S,D], transpose(k)), t), bias), -1)
    After:
        softmax(add(matmul(mul(q, t), transpose(k)), bias), -1)

    Requires: `ViewsToReshape` and `RemoveNoOps` ran.
    Ensures: the same values up to rounding.
    Declines when: never; a tensor with a number for each key is no temperature, and what another tool quantized before
        the product keeps its place there.
    Why: an attention has a number for its scale, so that one whose scores are multiplied with a tensor is none.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for product in calls(gm.graph, *MATMULS):
            scores = _times_numbers(gm, product)
            if (found := _temperature(gm, product, scores[-1])) is None:
                continue
            scaled, factor = found
            emit = Emitter(scaled)  # the factor can be made behind the product
            query, key = product.args
            new = {product: emit(product.target, emit(scaled.target, query, factor), key)}  # type: ignore[arg-type]
            for node in scores[1:]:
                new[node] = emit(node.target, *map_arg(node.args, lambda n, new=new: new.get(n, n)))  # type: ignore[arg-type, misc]
            scaled.replace_all_uses_with(new[scores[-1]])
            gm.graph.erase_node(scaled)
            self.fire()


def _times_numbers(gm: GraphModule, product: Node) -> list[Node]:
    """`product`, and what multiplies it with one number after the other and is all that reads it."""
    found = [product]
    while (user := only_user(found[-1])) is not None and is_call(user, *_SCALES):
        if user.args[0] is not found[-1] or scalar(gm, user.args[1]) is None:
            break
        found.append(user)
    return found


def _temperature(gm: GraphModule, product: Node, scores: Node) -> tuple[Node, Node] | None:
    """What multiplies `scores` with a tensor that the first operand of `product` could be multiplied with, and that."""
    scaled, query = only_user(scores), product.args[0]
    if scaled is None or not is_call(scaled, *_SCALES) or not isinstance(query, Node):
        return None
    if is_call(strip(query, *SAME_ELEMENTS), DEQUANTIZE):
        return None
    first, second = scaled.args[:2]
    if is_call(scaled, aten.mul.Tensor) and second is scores:
        first, second = second, first
    if first is not scores or not isinstance(second, Node) or scalar(gm, second) is not None:
        return None
    fits = same(shape(scaled), shape(product)) and _multiplies_rows(shape(second), shape(query))
    if not fits or {dtype(second), dtype(query)} != {dtype(scaled)} or not _leads_to_softmax(scaled):
        return None
    return scaled, second


def _multiplies_rows(factor: Any, rows: Any) -> bool:
    """Whether a tensor of shape `factor` has at most one number for each row of one of shape `rows`."""
    if not factor:
        return True
    sizes = list(zip(reversed(factor), reversed(rows), strict=False))
    return len(factor) <= len(rows) and is_one(factor[-1]) and all(is_one(f) or same([f], [r]) for f, r in sizes[1:])


def _leads_to_softmax(node: Node) -> bool:
    user: Node | None = node
    while (user := only_user(user)) is not None and is_call(user, *_MASKING):  # type: ignore[arg-type]
        pass
    return is_call(user, *SOFTMAXES)
