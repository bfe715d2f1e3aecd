"""Reads the pieces of a mixture of experts as Transformers' "batched_mm" and "grouped_mm" write them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.constants import is_constant_expression
from passes.graph import aten, is_call, shape, strip

_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def is_grouped(node: Node) -> bool:
    """Whether `node` multiplies each group of rows with the matrix of its expert; transformers need not be there."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _GROUPED


def routed_products(graph: Graph) -> Iterator[Node]:
    """The products with weights that are gathered, or applied to groups of rows."""
    for node in graph.nodes:
        gathers = is_call(node, aten.bmm.default, aten.matmul.default) and any(_gathered(a)[0] for a in node.args)
        if gathers or is_grouped(node):
            yield node


@dataclass(frozen=True)
class RoutedProduct:
    """`node [S,N]`: each row of `x [S,K]` times the matrix of its expert, plus its bias.

    Attributes:
        weight: constant `[E,N,K]`, or `[E,K,N]` if `is_transposed`.
        bias: constant `[E,N]`.
        by: what tells the expert of each row: ids `[S]` of gathered weights, offsets `[E]` of groups.
    """

    node: Node
    x: Node
    weight: Node
    is_transposed: bool
    bias: Node | None
    by: Node


def read_product(node: Node) -> RoutedProduct | None:
    """`node` as a routed product, with its bias if `node` is the addition; None if it is anything else."""
    bias, ids, product = None, None, node
    if is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
        bias, ids = _gathered(node.args[1])  # as `out.add_(bias)` captures
        if bias is None or not isinstance(node.args[0], Node):
            return None
        product = node.args[0]
    if product.op == "call_function" and is_grouped(product):
        x, weight, by = product.args[:3]
        if not is_constant_expression(weight):
            return None
        assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(by, Node)
        if ids is not None and ids is not _sorted_ids(by):
            return None
        return RoutedProduct(node, x, weight, True, bias, by)
    return _read_gathered(node, product, bias, ids)


def _read_gathered(node: Node, product: Node, bias: Node | None, ids: Node | None) -> RoutedProduct | None:
    """`squeeze(bmm(w[ids], unsqueeze(x, -1)), -1)`, or `squeeze(bmm(unsqueeze(x, 1), w[ids]), 1)`."""
    if not is_call(product, aten.squeeze.dim) or not is_call(product.args[0], aten.bmm.default):
        return None
    left, right = product.args[0].args  # type: ignore[union-attr]
    is_transposed = bool(product.args[1] == 1)
    column, weight = (left, right) if is_transposed else (right, left)
    axes = (1,) if is_transposed else (-1, 2)
    found, by = _gathered(weight)
    if found is None or by is None or len(shape(found)) != 3 or (ids is not None and ids is not by):
        return None
    if not isinstance(column, Node) or not is_call(column, aten.unsqueeze.default):
        return None
    if product.args[1] not in axes or column.args[1] not in axes:
        return None
    x = column.args[0]
    assert isinstance(x, Node)
    return RoutedProduct(node, x, found, is_transposed, bias, by)


def _gathered(node: object) -> tuple[Node | None, Node | None]:
    """(w, ids) of `w[ids]`, a constant indexed along its first axis."""
    source, ids = _indexed(node)
    return (source, ids) if is_constant_expression(source) else (None, None)


@dataclass(frozen=True)
class WeightedSum:
    """`sum(reshape(result * weights, [T,k,H]), 1)`, the end of a mixture of experts.

    Attributes:
        result: `[S,H]`, what the experts made of `S = T k` rows.
        weights: `[T,k]`.
        permutation: `[S]`, the order of the rows by expert; None if they are in the order of tokens.
    """

    result: Node
    weights: Node
    permutation: Node | None


def read_weighted_sum(total: Node) -> WeightedSum | None:
    """`total`, a sum, as the weighted sum over the experts of each token; None if it is anything else."""
    rows, axes, *keep = total.args
    if list(axes) != [1] or any(keep) or total.kwargs or not is_call(rows, aten.reshape.default):  # type: ignore[arg-type]
        return None
    assert isinstance(rows, Node)
    weighted, permutation = _restored(rows.args[0])
    if len(shape(rows)) != 3 or not is_call(weighted, aten.mul.Tensor):
        return None
    assert isinstance(weighted, Node)
    result, column = weighted.args
    if not isinstance(column, Node) or not is_call(column, aten.unsqueeze.default) or column.args[1] not in (-1, 1):
        return None
    flat = column.args[0]
    if permutation is not None:
        flat, order = _indexed(flat)
        if order is not permutation:
            return None
    weights = _flattened(flat)
    if weights is None or not isinstance(result, Node) or shape(weights) != shape(rows)[:2]:
        return None
    return WeightedSum(result, weights, permutation)


def expert_index(product: RoutedProduct, permutation: Node | None) -> Node | None:
    """`[T,k]`, the experts of each token, if they route `product`, whose rows are in the order of `permutation`."""
    if permutation is None:
        return _flattened(product.by)
    experts = shape(product.weight)[0]
    ids = _sorted_ids(product.by)
    if ids is None or product.by.args[0].args[1:] != (experts, 0, experts - 1):  # type: ignore[union-attr]
        return None
    sort, which = ids.args if is_call(ids, operator.getitem) else (None, None)
    if not is_call(sort, aten.sort.default) or which != 0 or permutation.args != (sort, 1):
        return None
    ascending = sort.args[1:] in ((), (-1,), (-1, False))  # type: ignore
    return _flattened(sort.args[0]) if ascending else None  # type: ignore[union-attr]


def copied_tokens(rows: Node, permutation: Node | None, k: int) -> Node | None:
    """`x [T,H]` of `repeat_interleave(x, k, 0)`, or of `x[permutation // k]`."""
    if permutation is None:
        copied = is_call(rows, aten.repeat_interleave.self_int) and rows.args[1:3] == (k, 0)
        return rows.args[0] if copied else None  # type: ignore[return-value]
    source, order = _indexed(rows)
    divided = is_call(order, aten.floor_divide.default) and order.args == (permutation, k)  # type: ignore[union-attr]
    return source if divided else None


def _flattened(node: object) -> Node | None:
    """`y [T,k]` of `reshape(y, [-1])`."""
    if not isinstance(node, Node) or not is_call(node, aten.reshape.default) or len(shape(node)) != 1:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and len(shape(source)) == 2 else None


def _sorted_ids(offsets: Node) -> Node | None:
    """`ids` of `cumsum(histc(float(ids), E, 0, E - 1))`, the ends of the groups of sorted ids."""
    histogram = offsets.args[0] if is_call(offsets, aten.cumsum.default) else None
    if not isinstance(histogram, Node) or not is_call(histogram, aten.histc.default):
        return None
    source = histogram.args[0]
    return strip(source, aten._to_copy.default) if isinstance(source, Node) else None


def _restored(node: object) -> tuple[Node | None, Node | None]:
    """(y, p) of `y[inverse of p]`, with `index_put(empty_like(p), [p], arange)`; of others (`node`, None)."""
    source, inverse = _indexed(node)
    if not isinstance(inverse, Node) or not is_call(inverse, aten.index_put.default):
        return (node, None) if isinstance(node, Node) else (None, None)
    positions: Any = inverse.args[1]
    counts = is_call(inverse.args[2], aten.arange.default) and len(inverse.args[2].args) == 1  # type: ignore[union-attr]
    if len(inverse.args) > 3 or len(positions) != 1 or not counts:
        return None, None
    return source, positions[0]


def _indexed(node: object) -> tuple[Node | None, Node | None]:
    """(x, i) of `x[i]`, with `i` a vector."""
    if not isinstance(node, Node) or not is_call(node, aten.index.Tensor):
        return None, None
    source, indices = node.args
    assert isinstance(source, Node) and isinstance(indices, (list, tuple))
    index = indices[0]
    if len(indices) != 1 or not isinstance(index, Node) or len(shape(index)) != 1:
        return None, None
    return source, index
