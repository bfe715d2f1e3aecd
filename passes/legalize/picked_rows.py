"""Rows that a mask picks, worked on and put back, become all rows of which the mask keeps some."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from passes.base import Pass
from passes.dependence import same_value
from passes.formats import get_format
from passes.graph import TRANSPARENT, Emitter, argument, aten, calls, is_call, is_pointwise, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.normalize.attention_layout import same
from passes.normalize.masked_writes import as_bool, column_of, mask_of

__all__ = ["PickedRowsToAll"]


class PickedRowsToAll(Pass):
    """Compute on every token what a model computes on those that it picks, and add zeros for the others.

    Before, the usual loop over experts (`m` [K,T]: which of a token's K choices are this expert):
        k, t = where(m)
        y = index_add(y, 0, t, expert(index(x[T,H], [t])) * unsqueeze(index(w[T,K], [t, k]), -1))    # or y[t] += ...
    After:
        y = y + sum(where(unsqueeze(m, -1), expert(x[1,T,H]) * unsqueeze(transpose(w)[K,T], -1), 0), [0])

    Requires: `InsertQdq` ran: layers have the ranges of the tokens that they see.
    Ensures: the same sums, in another order; a layer works on all tokens, whatever it was picked for.
    Declines when: something between picking and putting back works on more than single rows, or rows are put back by
        another mask; then nobody is told here, as `build_engine` names what remains.
    Why: a list of places has a size that depends on data, for which TensorRT has no operator.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.index_add.default, aten.index_put.default):
            picked = _read(node)
            if picked is not None:
                node.replace_all_uses_with(_all_rows(picked, Emitter(node)))
                gm.graph.erase_node(node)
                self.fire()


@dataclass(frozen=True)
class _Picked:
    """`result` is `into` with `rows [n, ...]` added at the places of `mask`, or put there.

    Attributes:
        axes: for each of the first axes of `into`, the axis of `mask` that says where on it a row goes.
        region: what `rows` is computed by from single rows, in the order of the graph.
    """

    result: Node
    into: Node
    rows: Node
    mask: Node
    axes: Sequence[int]
    adds: bool
    region: list[Node]


def _read(node: Node) -> _Picked | None:
    if is_call(node, aten.index_add.default):
        plain = argument(node, "dim") == 0 and argument(node, "alpha") == 1
        indices, rows, adds = [argument(node, "index")] if plain else [], argument(node, "source"), True
    else:
        indices, rows, adds = argument(node, "indices"), argument(node, "values"), bool(argument(node, "accumulate"))
    into = node.args[0]
    assert isinstance(into, Node)
    found = _places(indices, into)
    if found is None:
        return None
    mask, axes = found
    if not adds and len(axes) != len(shape(mask)):  # a row that is written twice has no value
        increment = _increment(into, rows, found)
        if increment is None:
            return None
        rows, adds = increment, True
    if len(shape(rows)) != len(shape(into)) - len(axes) + 1:
        return None
    region = _region(rows, mask)
    return _Picked(node, into, rows, mask, axes, adds, region) if region is not None else None


def _increment(into: Node, rows: Node, places: tuple[Node, list[int]]) -> Node | None:
    """r of `y[places] = y[places] + r`."""
    if not is_call(rows, aten.add.Tensor) or argument(rows, "alpha") != 1:
        return None
    for picked, rest in (rows.args[:2], rows.args[1::-1]):
        if not is_call(picked, aten.index.Tensor) or not isinstance(rest, Node):
            continue
        if picked.args[0] is into and _places(picked.args[1], into) == places:  # type: ignore[union-attr,arg-type]
            return rest
    return None


def _places(indices: Sequence[object], x: Node) -> tuple[Node, list[int]] | None:
    """(mask, its axes) if `indices` of the first axes of `x` are places of one mask: along all of its axes, or some."""
    whole = mask_of(indices, x)
    if whole is not None:
        return whole, list(range(len(shape(whole))))
    columns = [column_of(index) if isinstance(index, Node) else None for index in indices]
    known = [column for column in columns if column is not None]
    if not known or len(known) < len(columns) or len({mask for mask, _ in known}) > 1:
        return None
    mask, axes = known[0][0], [axis for _, axis in known]
    sizes = [size for axis in axes for size in shape(mask)[axis : axis + 1]]
    return (mask, axes) if len({*axes}) == len(axes) and same(shape(x)[: len(axes)], sizes) else None


def _region(rows: Node, mask: Node) -> list[Node] | None:
    """What leads from rows that `mask` picks to `rows`, if each of it works on single rows."""
    found: set[Node] = set()
    pending = [rows]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if is_call(node, aten.index.Tensor):
            places = _places(node.args[1], node.args[0])  # type: ignore[arg-type]
            if places is None or not same_value(places[0], mask):
                return None
        elif not _works_on_rows(node):
            return None
        else:
            with_rows = [operand for operand in node.all_input_nodes if _has_rows(operand)]
            if any(_is_picked(operand) for operand in {*node.all_input_nodes}.difference(with_rows)):
                return None  # by another mask
            pending += with_rows
    return sorted(found) if any(is_call(node, aten.index.Tensor) for node in found) else None


def _has_rows(node: Node) -> bool:
    """Whether data decides how many rows `node` has: two picks by one mask have sizes of two names."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    sizes: Sequence[Any] = getattr(value, "shape", ())
    return len(sizes) > 0 and bool(free_unbacked_symbols(sizes[0]))


def _is_picked(node: Node) -> bool:
    """Whether data decides a size of `node`."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(free_unbacked_symbols(size) for size in value.shape)


_ALONG_LAST = {aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.slice.Tensor: 1}


def _works_on_rows(node: Node) -> bool:
    if is_call(node, aten.linear.default, QUANTIZE, DEQUANTIZE, operator.getitem, aten._to_copy.default, *TRANSPARENT):
        return True
    if is_call(node, DYNAMIC_QUANTIZE):
        return bool(get_format(str(node.kwargs["format"])).block)  # else one scale for all rows is measured
    if is_call(node, aten.rms_norm.default, aten.layer_norm.default):
        return len(argument(node, "normalized_shape")) < len(shape(node))
    if is_call(node, aten.unsqueeze.default):
        return argument(node, "dim") in (-1, len(shape(node)) - 1)
    if node.target in _ALONG_LAST:
        args: tuple[Any, ...] = node.args
        axis = (*args[_ALONG_LAST[node.target] :], 0)[0]
        return axis in (-1, len(shape(args[0])) - 1)
    return is_pointwise(node)


def _all_rows(picked: _Picked, emit: Emitter) -> Node:
    lead = len(shape(picked.mask))
    copies: dict[Node, Node] = {}
    for node in picked.region:
        like = Emitter(emit.before, like=node)
        if is_call(node, aten.index.Tensor):
            copies[node] = _spread(node, lead, like)
            continue
        args: tuple[Any, ...]
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: copies.get(n, n))
        if is_call(node, aten.unsqueeze.default):
            args = (args[0], -1)
        elif node.target in _ALONG_LAST:
            position = _ALONG_LAST[node.target]
            args = (*args[:position], -1, *args[position + 1 :])
        assert callable(node.target)
        copies[node] = like(node.target, *args, **kwargs)
    rows, mask = copies[picked.rows], as_bool(picked.mask, emit)
    for _ in range(len(shape(rows)) - lead):
        mask = emit(aten.unsqueeze.default, mask, -1)
    if not picked.adds:
        order = [*picked.axes]
        assert sorted(order) == list(range(lead))
        if order != list(range(lead)):
            rest = range(lead, len(shape(rows)))
            full = emit(aten.expand.default, rows, [*emit.sizes(picked.mask), *[-1] * len(rest)])
            rows, mask = (emit(aten.permute.default, n, [*order, *rest]) for n in (full, mask))
        return emit(aten.where.self, mask, rows, picked.into)
    # not a product with the mask: a row that was not picked can be infinite, and inf * 0 is NaN
    kept = emit(aten.where.ScalarOther, mask, rows, 0.0)
    others = [axis for axis in range(lead) if axis not in picked.axes]
    total = emit(aten.sum.dim_IntList, kept, others) if others else kept
    order = [sorted(picked.axes).index(axis) for axis in picked.axes]
    if order != sorted(order):
        total = emit(aten.permute.default, total, [*order, *range(len(order), len(shape(total)))])
    return emit(aten.add.Tensor, picked.into, total)


def _spread(node: Node, lead: int, emit: Emitter) -> Node:
    """What `index(x, places)` is at every place of the mask, `[*lead, *rest]`, 1 on axes that it does not change on."""
    x = node.args[0]
    assert isinstance(x, Node)
    places = _places(node.args[1], x)  # type: ignore[arg-type]
    assert places is not None
    axes = places[1]
    rest = range(len(axes), len(shape(x)))
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order != list(range(len(axes))):
        x = emit(aten.permute.default, x, [*order, *rest])
    for axis in range(lead):
        if axis not in axes:
            x = emit(aten.unsqueeze.default, x, axis)
    return x
