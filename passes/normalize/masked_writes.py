"""What is written where a mask is true becomes a choice between two tensors of one size."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from passes.base import Pass
from passes.dependence import same_value
from passes.graph import Emitter, ancestors, argument, aten, calls, dtype, is_call, shape
from passes.normalize.attention_layout import same
from passes.normalize.mask_simplifier import unexpanded

__all__ = ["MaskedWritesToWhere", "as_bool", "column_of", "mask_of"]


_DROPS_AXIS = (
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.reshape.default, aten.view.default),
)


class MaskedWritesToWhere(Pass):
    """Rewrite writes at the places of a mask as cumulative sum, gather and where.

    Before, image features between the tokens of a text (`h` [B,S,H], `f` [N,H]):
        y = masked_scatter(h, expand(unsqueeze(m[B,S], -1)), f)     # or index_put(h, [m], f), index_put(h, where(m), f)
    After:
        rows = cat([zeros[1,H], f]); place = cumsum(m[B*S])         # the how manieth of the mask each token is
        y = where(unsqueeze(m, -1), reshape(index_select(rows, 0, place), [B,S,H]), h)
    Rows that `m` picked itself, as `masked_scatter(h, m, f(h[m]))`, are left as `index_put(h, [m], f(h[m]))`.

    Requires: `ViewsToReshape` and `RemoveNoOps` ran.
    Ensures: bit-equal values. Where the mask has more places than there are rows, a run in torch and in ONNX Runtime is
        an error, as before. Rows that are left over are ignored by `masked_scatter`, as before; `index_put` asserts
        in torch that there are none, and files hold no assertion.
    Declines when: values are added to what is there (`accumulate`), or indices are other than a mask or all places of
        one; or rows that are as many as data says, as they were picked by a mask themselves.
    Why: `index_put` with a mask lists the places of the mask, a tensor whose size depends on data: TensorRT has no
        NonZero.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.masked_scatter.default, aten.index_put.default, aten.index_copy.default):
            read = _masked_scatter if is_call(node, aten.masked_scatter.default) else _index_put
            write = read(node)
            if write is None:
                continue
            emit = Emitter(node)
            if _is_picked_by(write.values, write.mask, len(write.rest)):
                new = emit(aten.index_put.default, write.into, [write.mask], write.values)
            else:
                new = _written(write, emit)
            node.replace_all_uses_with(new)
            self.fire()


@dataclass(frozen=True)
class _Write:
    """Rows of `values` go where `mask` is true.

    Attributes:
        into: `[*lead, *rest]`.
        mask: boolean, broadcasts to `lead`.
        rest: sizes of a row.
        values: `[N, *rest]`, or `[*rest]` or what broadcasts to it if every place gets the same.
        same: whether every place gets the same.
        exact: whether there have to be as many rows as places.
    """

    into: Node
    mask: Node
    rest: list[int]
    values: Node
    same: bool
    exact: bool


def _is_picked_by(rows: Node, mask: Node, rest: int) -> bool:
    """Whether `rows`, as many as data says and each of `rest` axes, come from those that `mask` picks."""
    if len(shape(rows)) != rest + 1 or not free_unbacked_symbols(shape(rows)[0]):
        return False
    for pick in ancestors([rows]):
        if is_call(pick, aten.index.Tensor) and str(shape(pick)[0]) == str(shape(rows)[0]):
            found = mask_of(pick.args[1], pick.args[0])  # type: ignore[arg-type]
            if found is not None and same_value(found, mask):
                return True
    return False


def _written(write: _Write, emit: Emitter) -> Node:
    """The tensor after `write`."""
    lead = len(shape(write.into)) - len(write.rest)
    mask = as_bool(write.mask, emit)
    while len(shape(mask)) < lead:
        mask = emit(aten.unsqueeze.default, mask, 0)
    sizes = emit.sizes(write.into)
    picked = write.values if write.same else _picked(write, mask, sizes, emit)
    for _ in write.rest:
        mask = emit(aten.unsqueeze.default, mask, -1)
    return emit(aten.where.self, mask, picked, write.into)


def _picked(write: _Write, mask: Node, sizes: list[int | Node], emit: Emitter) -> Node:
    """For each place the row that it gets, shaped as the whole; any row where there is none."""
    lead = sizes[: len(sizes) - len(write.rest)]
    full = emit(aten.expand.default, mask, lead)
    flat = emit(aten.reshape.default, full, [-1])
    place = emit(aten.cumsum.default, emit(aten._to_copy.default, flat, dtype=torch.int64), 0)  # counts from 1
    width = [math.prod(write.rest)] if write.rest else []
    rows = emit(aten.reshape.default, write.values, [-1, *width])
    if write.exact:
        _assert_count(flat, rows, emit)
    none = emit(aten.new_zeros.default, rows, [1, *width])  # for places before the first, and where there are no rows
    rows = emit(aten.cat.default, [none, rows])
    return emit(aten.reshape.default, emit(aten.index_select.default, rows, 0, place), sizes)


def _assert_count(flat: Node, rows: Node, emit: Emitter) -> None:
    """Let torch say where there are more rows than places."""
    count = emit(aten.sum.default, flat)
    message = "as many values as the mask has places are wanted"
    emit(aten._assert_async.msg, emit(aten.eq.Scalar, count, emit.sizes(rows)[0]), message)


def _masked_scatter(node: Node) -> _Write | None:
    """`masked_scatter`: by rows where the mask is the same along the last axes, else by elements."""
    into, mask, source = node.args
    assert isinstance(into, Node) and isinstance(mask, Node) and isinstance(source, Node)
    if dtype(mask) is not torch.bool:
        return None
    if not same(shape(into), shape(node)):
        into = Emitter(node).getitem(Emitter(node)(aten.broadcast_tensors.default, [into, mask]), 0)
    mask = unexpanded(mask)
    sizes, rest = list(shape(into)), list[int]()
    while len(shape(mask)) and statically_known_true(shape(mask)[-1] == 1) and isinstance(sizes[-1], int):
        width = sizes[-1] * math.prod(rest)
        if not _has_rows(source, width):
            break
        rest.insert(0, sizes.pop())
        mask = _without_last(mask, Emitter(node))
    return _Write(into, mask, rest, source, same=False, exact=False)


def _without_last(mask: Node, emit: Emitter) -> Node:
    """`mask` without its last axis, which has one element."""
    if is_call(mask, aten.unsqueeze.default) and argument(mask, "dim") in (-1, len(shape(mask)) - 1):
        return mask.args[0]  # type: ignore[return-value]
    if is_call(mask, aten.bitwise_not.default, aten.logical_not.default):
        return emit(mask.target, _without_last(mask.args[0], emit))  # type: ignore[arg-type]
    return emit(aten.squeeze.dim, mask, -1)


def _has_rows(source: Node, width: int) -> bool:
    """Whether the elements of `source` are rows of `width`, whatever its dynamic sizes are."""
    known = math.prod(size for size in shape(source) if isinstance(size, int))
    return width > 0 and known % width == 0


def _index_put(node: Node) -> _Write | None:
    """`index_put(into, [mask], values)`, or with the places of a mask: each place has a row, or all have the same."""
    into = node.args[0]
    if is_call(node, aten.index_copy.default):
        indices = [argument(node, "index")] if argument(node, "dim") == 0 else []
        values = argument(node, "source")
    else:
        indices = [] if argument(node, "accumulate") else argument(node, "indices")
        values = argument(node, "values")
    assert isinstance(into, Node)
    mask = mask_of(indices, into)
    if mask is None:
        return None
    rest = list(shape(into)[len(shape(mask)) :])
    if not all(isinstance(size, int) for size in rest):
        return None
    emit = Emitter(node)
    if len(shape(values)) == len(rest) + 1 and statically_known_true(shape(values)[0] == 1):
        values = emit(aten.squeeze.dim, values, 0)
    if len(shape(values)) <= len(rest):
        return _Write(into, mask, rest, values, same=True, exact=False)
    if free_unbacked_symbols(shape(values)[0]):  # picked by a mask themselves: `PickedRowsToAll` sees to both
        return None
    if list(shape(values)[1:]) != rest:
        values = emit(aten.expand.default, values, [-1, *rest])
    return _Write(into, mask, rest, values, same=False, exact=True)


def as_bool(mask: Node, emit: Emitter) -> Node:
    """`mask` as a boolean: `nonzero` lists the places of numbers, too."""
    return mask if dtype(mask) is torch.bool else emit(aten.ne.Scalar, mask, 0)


def mask_of(indices: Sequence[object], x: Node) -> Node | None:
    """The mask, of any dtype, whose places `indices` of the first axes of `x` are: itself, or what `nonzero` lists.

    It has the sizes of those axes.
    """
    if len(indices) == 1 and isinstance(indices[0], Node) and dtype(indices[0]) is torch.bool:
        return indices[0]
    columns = [column_of(index) if isinstance(index, Node) else None for index in indices]
    masks = {column[0] for column in columns if column is not None}
    if len(masks) != 1 or None in columns:
        return None
    (mask,) = masks
    in_order = [column[1] for column in columns if column is not None] == list(range(len(shape(mask))))
    return mask if in_order and same(shape(x)[: len(indices)], shape(mask)) else None


def column_of(index: Node) -> tuple[Node, int] | None:
    """(mask, axis) of one axis of the places of a mask."""
    source = index.args[0] if index.args else None
    if is_call(index, operator.getitem) and is_call(source, aten.where.default, aten.nonzero_numpy.default):
        return source.args[0], index.args[1]  # type: ignore[union-attr,return-value]
    if is_call(index, operator.getitem) and is_call(source, aten.unbind.int):
        places, axis, dim = source.args[0], index.args[1], argument(source, "dim")  # type: ignore[union-attr,arg-type]
    elif is_call(index, aten.select.int):
        places, axis, dim = source, argument(index, "index"), argument(index, "dim")
    elif is_call(index, *_DROPS_AXIS):
        places, axis, dim = source, 0, 1
        if not is_call(places, aten.nonzero.default) or len(shape(index)) != 1 or shape(places)[1] != 1:  # type: ignore[arg-type]
            return None
    else:
        return None
    if not is_call(places, aten.nonzero.default) or dim not in (1, -1):
        return None
    mask = places.args[0]  # type: ignore[union-attr]
    assert isinstance(mask, Node)
    return mask, int(axis) % len(shape(mask))  # type: ignore[arg-type]
