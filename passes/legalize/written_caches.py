"""State that is written into, in the forms that readers of a file run fast: writes at places, or choices by place."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, is_call, shape, strip, val
from passes.state import is_returned, new_of, written_at

__all__ = ["ChooseWritten", "ScatterWritten"]


class ChooseWritten(Pass):
    """Write into state by choosing at each place between what is new and what was there.

    Before:
        all = index_copy(past, axis, start + arange(n), new)
    After:
        order = arange(length) - start
        all = where((0 <= order) & (order < n), index_select(new, axis, clamp(order, 0, n - 1)), past)
    Where `n` is 1 `new` is chosen as it is. At positions `p` that are no such row, `order` is `argmax(p == arange)`.

    Requires: nothing.
    Ensures: the same values. What is chosen is computed once for all writes at the same positions.
    Declines when: never; what is written into something else than an input, or is not given back, stays.
    Why: ONNX writes index_copy as a ScatterND between two transposes of the whole state. TensorRT makes one kernel of
        the choice and what reads it: in decode that dequantizes, appends, quantizes and attends.
    """

    def rewrite(self, gm: GraphModule) -> None:
        made: dict[tuple[Any, ...], tuple[Node, Node | None]] = {}
        for node, axis, positions in _writes(gm):
            past, (new,) = node.args[0], new_of(node)
            length = shape(past)[axis]
            key = (positions, length, len(shape(past)) - axis)
            if key not in made:
                made[key] = _choice(positions, past, axis, node)
            chosen, order = made[key]
            emit = Emitter(node)
            rows = new if order is None else emit(aten.index_select.default, new, axis, order)
            node.replace_all_uses_with(emit(aten.where.self, chosen, rows, past))
            self.fire()


def _writes(gm: GraphModule) -> Iterator[tuple[Node, int, Node]]:
    """The writes of whole slices into state, with the axis and the positions."""
    for node in calls(gm.graph, aten.index_copy.default, aten.index_put.default):
        if (found := written_at(node)) is not None and is_returned(node):
            yield node, *found


def _choice(positions: Node, past: Node, axis: int, before: Node) -> tuple[Node, Node | None]:
    """Where something is written, `[length, 1, ...]`, and which row of what is new; None for the only row."""
    emit = Emitter(before)
    (length,), (count,) = emit.sizes(past)[axis : axis + 1], emit.sizes(positions)
    places = emit(aten.arange.default, length, device=val(positions).device)
    start = _start(positions)
    if start is not None:
        order = emit(aten.sub.Tensor, places, start)
        chosen = emit(aten.logical_and.default, emit(aten.ge.Scalar, order, 0), emit(aten.lt.Scalar, order, count))
        last = count - 1 if isinstance(count, int) else emit(operator.sub, count, 1)
        rows = emit(aten.clamp.default, order, 0, last)
    else:
        equal = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, places, 1), positions)
        chosen, rows = emit(aten.any.dim, equal, 1), emit(aten.argmax.default, emit(aten._to_copy.default, equal, dtype=torch.int32), 1)
    rest = len(shape(past)) - axis - 1
    chosen = emit(aten.reshape.default, chosen, [length, *[1] * rest])
    return chosen, None if count == 1 else rows


def _start(positions: Node) -> Node | None:
    """The first of `positions` where they are it and those that follow it, `arange(n) + start`; None for others."""
    source = strip(positions)
    if not is_call(source, aten.add.Tensor) or source.kwargs.get("alpha", 1) != 1:
        return None
    for row, start in (source.args[:2], source.args[1::-1]):
        if isinstance(row, Node) and isinstance(start, Node) and _counts(row) and shape(start).numel() == 1:
            return start
    return None


def _counts(row: Node) -> bool:
    """Whether `row` is 0, 1, 2, ..."""
    if is_call(row, aten.arange.start_step):
        return row.args[0] == 0 and argument(row, "step") == 1
    return is_call(row, aten.arange.default) or (is_call(row, aten.arange.start) and row.args[0] == 0)


class ScatterWritten(Pass):
    """Write into state element by element, without moving axes.

    Before:
        all = index_copy(past, axis, positions, new)
    After:
        all = scatter(past, axis, expand(reshape(positions, [n, 1, ...]), new.shape), new)

    Requires: nothing.
    Ensures: the same values; a position behind the end is an error in what runs the file, as before.
    Declines when: never; what is written into something else than an input, or is not given back, stays.
    Why: ONNX writes index_copy as a ScatterND between two transposes of the whole state; ScatterElements reads and
        writes what is new, and ONNX Runtime does it in place where it may.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node, axis, positions in _writes(gm):
            emit, past, (new,) = Emitter(node), node.args[0], new_of(node)
            column = emit(aten.reshape.default, positions, [-1, *[1] * (len(shape(past)) - axis - 1)])
            index = emit(aten.expand.default, column, emit.sizes(new))
            node.replace_all_uses_with(emit(aten.scatter.src, past, axis, index, new))
            self.fire()
