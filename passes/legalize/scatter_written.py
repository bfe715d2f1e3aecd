"""State that is written into is written element by element, for readers that have no write of slices."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import Emitter, aten, is_call, val
from passes.state import writes

__all__ = ["ScatterWritten"]


class ScatterWritten(Pass):
    """Write into state element by element, without moving axes.

    Before:
        all = index_copy(past, axis, positions, new)              # or index_put, or slice_scatter
    After:
        all = scatter(past, axis, expand(reshape(positions, [n, 1, ...]), new.shape), new)

    Requires: `AppendInFloat` ran for what ONNX has no ScatterElements for, which is FP8.
    Ensures: the same values; a position behind the end is an error in what runs the file, as it is in torch.
    Declines when: never; what is written into something else than an input, or is not given back, stays.
    Why: ONNX writes index_copy as a ScatterND between two transposes of the whole state. ScatterElements reads and
        writes what is new alone, and ONNX Runtime does that in place where it may.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for write in writes(gm.graph):
            emit = Emitter(write.node)
            positions = write.at
            if is_call(write.node, aten.slice_scatter.default):
                count = emit.sizes(write.new)[write.axis]
                row = emit(aten.arange.default, count, device=val(write.past).device)
                positions = emit(aten.add.Tensor, row, write.at)
            column = emit(aten.reshape.default, positions, [-1, *[1] * write.trailing])
            index = emit(aten.expand.default, column, emit.sizes(write.new))
            write.node.replace_all_uses_with(emit(aten.scatter.src, write.past, write.axis, index, write.new))
            self.fire()
