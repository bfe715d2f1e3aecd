"""Bits of numbers that are 0 or 1 become logic."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import scalar
from passes.graph import TRANSPARENT, Emitter, aten, calls, dtype, strip

__all__ = ["BitsToLogic"]

_LOGIC = {
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.bitwise_xor.Tensor: aten.logical_xor.default,
    aten.__and__.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.__xor__.Tensor: aten.logical_xor.default,
}
_MOVES = (*TRANSPARENT, aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.squeeze.dim)


class BitsToLogic(Pass):
    """Rewrite `&`, `|` and `^` of integers that are 0 or 1 as the logic of booleans.

    Before:
        m = bitwise_or(full([2, 9], 1, int32), causal)          # causal is boolean; as in CPM-Ant
    After:
        m = _to_copy(logical_or(full([2, 9], 1, int32), causal), int32)

    Requires: nothing.
    Ensures: the same values and dtype.
    Declines when: never; an integer that may be another number keeps its bits.
    Why: TensorRT has no operator on the bits of integers.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *_LOGIC):
            if dtype(node) is torch.bool or not all(_is_flag(gm, operand) for operand in node.args):
                continue
            emit = Emitter(node)
            logic = emit(_LOGIC[node.target], *node.args)  # type: ignore[index]
            node.replace_all_uses_with(emit(aten._to_copy.default, logic, dtype=dtype(node)))
            self.fire()


def _is_flag(gm: GraphModule, operand: object) -> bool:
    """Whether `operand` is a tensor of nothing but 0 and 1."""
    if not isinstance(operand, Node):
        return False
    source = strip(operand, *_MOVES, aten._to_copy.default)
    return dtype(source) is torch.bool or scalar(gm, source) in (0, 1)
