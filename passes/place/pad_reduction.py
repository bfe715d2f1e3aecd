"""The reduction axis of a linear layer is filled up to whole blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, following, shape
from passes.ir import BATCHED_LINEAR

__all__ = ["PadReduction", "padding"]

_MOST = 8  # parts of the axis, one of which can be added


class PadReduction(Pass):
    """Zeros behind both operands of a linear layer whose reduction axis a block does not divide.

    Before (x [..., 682], w [N, 682], blocks of 16):
        y = linear(x, w, b)
    After:
        y = linear(constant_pad_nd(x, [0, 6]), constant_pad_nd(w, [0, 6]), b)

    Requires: weights as constant expressions; nothing is quantized yet.
    Ensures: the same product, as zeros add nothing; both operands are padded or neither. The linear layer is the same
        node, consumers of one tensor share what is padded, and other users keep the original.
    Declines when: more than an eighth would be added, or the input is a constant: `InsertQdq` then says that it does
        not fit.
    Why: NVFP4 has a scale for each whole block. TensorRT fills up in the kernel that makes the input, or in one more;
        the product then takes part in FP4 like any other, where it stayed in half.
    """

    def __init__(self, blocks: Mapping[Node, int]) -> None:
        """`blocks`: elements of a block, for calls of `aten.linear` and `qcompile::batched_linear`."""
        super().__init__()
        self.blocks = blocks

    def rewrite(self, gm: GraphModule) -> None:
        padded: dict[tuple[Node, int], Node] = {}
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            x, weight = node.args[:2]
            assert isinstance(x, Node) and isinstance(weight, Node)
            extra = padding(shape(weight)[-1], self.blocks.get(node, 1))
            if not extra or is_constant_expression(x):
                continue
            for index, operand in enumerate((x, weight)):
                if (operand, extra) not in padded:
                    # a weight in front of its reader, an activation where all its readers come behind
                    emit = Emitter(node if index else following(operand), like=node)
                    padded[operand, extra] = emit(aten.constant_pad_nd.default, operand, [0, extra], 0.0)
                node.update_arg(index, padded[operand, extra])
            self.fire()


def padding(size: object, block: int) -> int:
    """Zeros that fill an axis of `size` up to whole blocks; 0 if none are missing, or too many."""
    if not isinstance(size, int):
        return 0
    extra = -size % block
    return extra if extra * _MOST <= size else 0
