"""State that is written into is chosen place by place, for readers that fuse choices and not writes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, is_call, shape, strip, val
from passes.state import Write, writes

__all__ = ["ChooseWritten"]


class ChooseWritten(Pass):
    """Write into state by choosing at each place between what is new and what was there.

    Before:
        all = index_copy(past, axis, start + arange(n), new)      # or index_put, or slice_scatter at start
    After:
        order = arange(length) - start
        all = where((0 <= order) & (order < n), index_select(new, axis, clamp(order, 0, n - 1)), past)
    Where `n` is 1, `new` is chosen as it is. At positions `p` that are no such row, `order` is `argmax(arange == p)`.

    Requires: nothing.
    Ensures: the same values. What is chosen is computed once for all writes at the same positions.
    Declines when: never; what is written into something else than an input, or is not given back, stays.
    Why: ONNX writes index_copy as a ScatterND between two transposes of the whole state. TensorRT makes one kernel of
        the choice and what is around it: dequantize, append, quantize.
    """

    def rewrite(self, gm: GraphModule) -> None:
        made: dict[tuple[Any, ...], tuple[Node, Node | None]] = {}
        for write in writes(gm.graph):
            sizes = str(shape(write.past)[write.axis]), str(shape(write.new)[write.axis])  # a dynamic one has no hash
            key = (write.at, *sizes, write.trailing)
            if key not in made:
                made[key] = _choice(write)
            chosen, order = made[key]
            emit = Emitter(write.node)
            new = write.new if order is None else emit(aten.index_select.default, write.new, write.axis, order)
            write.node.replace_all_uses_with(emit(aten.where.self, chosen, new, write.past))
            self.fire()


def _choice(write: Write) -> tuple[Node, Node | None]:
    """Where something is written, `[length, 1, ...]`, and which row of what is new; None for the only row."""
    emit = Emitter(write.node)
    length, count = emit.sizes(write.past)[write.axis], emit.sizes(write.new)[write.axis]
    places = emit(aten.arange.default, length, device=val(write.past).device)
    start = _start(write.at)
    if start is not None:
        rows = emit(aten.sub.Tensor, places, start)
        chosen = emit(aten.logical_and.default, emit(aten.ge.Scalar, rows, 0), emit(aten.lt.Scalar, rows, count))
        last = count - 1 if isinstance(count, int) else emit(operator.sub, count, 1)
        rows = emit(aten.clamp.default, rows, 0, last)
    else:
        equal = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, places, 1), write.at)
        chosen = emit(aten.any.dim, equal, 1)
        rows = emit(aten.argmax.default, emit(aten._to_copy.default, equal, dtype=torch.int32), 1)
    chosen = emit(aten.reshape.default, chosen, [length, *[1] * write.trailing])
    return chosen, None if count == 1 else rows


def _start(at: int | Node) -> int | Node | None:
    """The first of the positions `at` where they are that and those that follow it; None for others."""
    if isinstance(at, int) or not isinstance(val(at), torch.Tensor):
        return at
    source = strip(at)
    if not is_call(source, aten.add.Tensor) or source.kwargs.get("alpha", 1) != 1:
        return None
    left, right = source.args[:2]
    for row, start in ((left, right), (right, left)):
        if isinstance(row, Node) and isinstance(start, Node) and _counts(row) and all(s == 1 for s in shape(start)):
            return start
    return None


def _counts(row: Node) -> bool:
    """Whether `row` is 0, 1, 2, ..."""
    if is_call(row, aten.arange.start_step):
        return bool(row.args[0] == 0 and argument(row, "step") == 1)
    return is_call(row, aten.arange.default) or bool(is_call(row, aten.arange.start) and row.args[0] == 0)
