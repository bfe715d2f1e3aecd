"""Mixtures of experts that gather weights, or sort tokens, become dense: every expert sees every token."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, dtype, is_call, shape
from passes.ir import BATCHED_LINEAR
from passes.normalize.routing import (
    RoutedProduct,
    copied_tokens,
    expert_index,
    read_product,
    read_weighted_sum,
    routed_products,
)


class RoutedExpertsToDense(Pass):
    """Rewrite the experts of Transformers' "batched_mm" and "grouped_mm" as linear layers of all experts.

    Before:
        ids = reshape(index[T,k], [-1]); rows = repeat_interleave(x[T,H], k)
        h = gate(bmm(w1[E,2I,H][ids], rows))                    # or: rows sorted by ids, and grouped_mm(rows, w1)
        y = sum(reshape(bmm(w2[E,H,I][ids], h) * reshape(weights[T,k], [-1]), [T,k,H]), 1)
    After:
        h = gate(batched_linear(x[1,T,H], w1))                  # [E,T,I]
        r = sum(weights * (index == arange(E)), -1)             # [E,T,1]
        y = sum(where(r == 0, 0, batched_linear(h, w2) * r), 0)

    Requires: `ViewsToReshape` and `RemoveNoOps` ran.
    Ensures: the same sums of products, in another order; `E / k` times the arithmetic.
    Declines when: the pieces are not those of one mixture: two products with the same routing, operators between them
        that work on each row alone, weights multiplied, and a sum over the experts of each token.
    Why: a gathered weight is no constant, and grouped_mm no operator of ONNX: neither can be quantized.
    """

    def rewrite(self, gm: GraphModule) -> None:
        rewritten = False
        for total in calls(gm.graph, aten.sum.dim_IntList):
            mixture = _read(total)
            if mixture is not None:
                _rewrite(mixture)
                self.fire()
                rewritten = True
        if rewritten:
            gm.graph.eliminate_dead_code()  # so that what is left is what was not rewritten
        for node in routed_products(gm.graph):
            self.decline(
                "these experts are gathered or grouped by token in a form that cannot be made dense, and stay in"
                " floating point; give qcompile.quantize the module, or export it with dense experts",
                node,
            )


# Operators on `[rows, N]` that work on each element, with numbers or other such tensors as arguments.
_POINTWISE = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.exp.default,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.minimum.default, aten.maximum.default,
    aten._to_copy.default, operator.getitem,
)  # fmt: skip
_ALONG_LAST: dict[object, int] = {
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.slice.Tensor: 1,
}  # -> position of the axis


@dataclass(frozen=True)
class _Mixture:
    """`total [T,H]` is the result for `tokens [T,H]`; `between` lies from `up` to `down`, in the order of the graph."""

    total: Node
    tokens: Node
    index: Node
    weights: Node
    up: RoutedProduct
    between: list[Node]
    down: RoutedProduct


def _read(total: Node) -> _Mixture | None:
    """The mixture of experts that ends in `total`, if all of its pieces fit."""
    end = read_weighted_sum(total)
    down = read_product(end.result) if end is not None else None
    between = _rows_alone(down.x) if down is not None else None
    if end is None or down is None or between is None:
        return None
    sources = {operand for node in [*between, down.x] for operand in _outside(node, between)}
    up = read_product(sources.pop()) if len(sources) == 1 else None
    if up is None or up.by is not down.by or shape(up.weight)[0] != shape(down.weight)[0]:
        return None
    index = expert_index(up, end.permutation)
    tokens = copied_tokens(up.x, end.permutation, int(shape(end.weights)[1]))
    if index is None or tokens is None or shape(index) != shape(end.weights):
        return None
    return _Mixture(total, tokens, index, end.weights, up, between, down)


def _rows_alone(end: Node) -> list[Node] | None:
    """The operators on single rows that lead from one product to `end`, in the order of the graph."""
    found: set[Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in found or read_product(node) is not None:
            continue
        axis = _ALONG_LAST.get(node.target)
        along_last = axis is not None and (node.args[axis] if len(node.args) > axis else 0) in (1, -1)
        if not (is_call(node, *_POINTWISE) or (node.op == "call_function" and along_last)):
            return None
        found.add(node)
        pending += node.all_input_nodes
    return sorted(found)


def _outside(node: Node, region: list[Node]) -> set[Node]:
    """What `node`, if it is of the region, reads from outside of it; else itself."""
    if node not in region:
        return {node}
    return {operand for operand in node.all_input_nodes if operand not in region}


def _rewrite(mixture: _Mixture) -> None:
    emit = Emitter(mixture.total)
    up, down, index, weights = mixture.up, mixture.down, mixture.index, mixture.weights
    hidden = _linear(emit, emit(aten.unsqueeze.default, mixture.tokens, 0), up)
    copies = {up.node: hidden}
    for node in mixture.between:
        like = Emitter(mixture.total, like=node)
        args = list(node.args)
        if (axis := _ALONG_LAST.get(node.target)) is not None:
            args[axis] = -1
        args = [copies.get(arg, arg) if isinstance(arg, Node) else arg for arg in args]
        assert callable(node.target)
        copies[node] = like(node.target, *args, **node.kwargs)
    result = _linear(emit, copies[down.x], down)
    experts = emit(aten.arange.default, int(shape(down.weight)[0]), dtype=dtype(index), device=index.meta["val"].device)
    hit = emit(aten.eq.Tensor, index, emit(aten.reshape.default, experts, [-1, 1, 1]))
    share = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, weights, hit), [-1], True)
    # not the product alone: an expert can overflow half precision on a token that is not its own, and inf * 0 is NaN
    product = emit(aten.mul.Tensor, result, share)
    kept = emit(aten.where.ScalarSelf, emit(aten.eq.Scalar, share, 0), 0.0, product)
    mixture.total.replace_all_uses_with(emit(aten.sum.dim_IntList, kept, [0]))


def _linear(emit: Emitter, x: Node, product: RoutedProduct) -> Node:
    weight = product.weight
    if product.is_transposed:
        weight = emit(aten.transpose.int, weight, 1, 2)
    assert is_constant_expression(weight)
    return emit(BATCHED_LINEAR, x, weight, product.bias)
