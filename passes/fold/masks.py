"""Attention masks and biases that no input changes are stored instead of computed."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.graph import argument, aten, calls, dtype, is_call, module_path, shape
from passes.ir import ATTENTION
from passes.normalize.size_functions import NotEvaluable, SizeFunctions
from passes.sdpa import SDPA

__all__ = ["FoldMasks"]

MAX_BYTES = 4 << 20
# What combines and arranges masks. Behind anything else lies the model, whose weights are no masks.
_COMBINES = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.clamp.default, aten._to_copy.default, aten.clone.default),
    *(aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.logical_not.default),
    *(aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.permute.default, aten.transpose.int),
    *(aten.slice.Tensor, aten.repeat.default),
)


class FoldMasks(Pass):
    """Evaluate the parts of a mask that depend on parameters and static sizes only.

    Before, a learned position bias and the mask of shifted windows (Swin):
        bias = unsqueeze(permute(reshape(index(table, positions), [49,49,H]), [2,0,1]), 0)     # [1,H,49,49]
        hide = masked_fill(sub(...), ne(sub(...), 0), -100)                                    # [W,1,49,49]
        y = qcompile.attention(q, k, v, add(bias, hide), s)
    After:
        y = qcompile.attention(q, k, v, add(constant, constant), s)

    Requires: `ConvertComputeDtype` ran, so that constants have the dtype that they are added in.
    Ensures: bit-equal values. A sum that broadcasts both of its terms stays: it would be larger than they are. A mask
        that several attentions share is stored once.
    Declines when: a part takes more than 4 MB or cannot be computed; it stays as it is.
    Why: a chain of aranges is a kernel in each block, and TensorRT does not evaluate a permute of more than some
        thousand numbers itself: attention with such a bias does not fuse.
    """

    def rewrite(self, gm: GraphModule) -> None:
        functions = SizeFunctions(gm, parameters=True)
        looked_at: set[Node] = set()
        for attention in calls(gm.graph, ATTENTION, SDPA):
            mask = attention.args[3] if len(attention.args) > 3 else None
            if isinstance(mask, Node):
                self._fold(gm, mask, functions, looked_at)
            for user in list(attention.users):
                if is_call(user, aten.masked_fill.Scalar):  # of `ZeroMaskedRows`
                    self._fold(gm, user.args[1], functions, looked_at)  # type: ignore[arg-type]  # a node

    def _fold(self, gm: GraphModule, node: Node, functions: SizeFunctions, looked_at: set[Node]) -> None:
        """Store `node` if nothing changes it, else what of its operands nothing changes."""
        if node in looked_at or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return
        looked_at.add(node)
        static = all(isinstance(size, int) for size in shape(node))
        if static and functions.is_size_function(node) and not _broadcasts_both(node) and not _is_number(node):
            value = self._value(node, functions)
            if value is not None:
                name = f"{module_path(node)}.mask".removeprefix(".")
                node.replace_all_uses_with(add_constant(gm, name, value, node))
                self.fire()
            return
        for operand in node.all_input_nodes if is_call(node, *_COMBINES) else ():
            self._fold(gm, operand, functions, looked_at)

    def _value(self, node: Node, functions: SizeFunctions) -> torch.Tensor | None:
        """The value of `node`; None if that changes with a dynamic size, is too large or cannot be computed."""
        if shape(node).numel() * dtype(node).itemsize > MAX_BYTES:
            self.decline(f"this part of the mask, {list(shape(node))}, is too large to store", node)
            return None
        try:
            samples = list(functions.samples(node))
        except NotEvaluable as error:
            self.decline(f"this part of the mask cannot be computed: {error}", node)
            return None
        (sizes, value), *more = samples
        return None if sizes or more else value.contiguous()


def _broadcasts_both(node: Node) -> bool:
    """Whether `node` adds two tensors to one that is larger than either."""
    if not is_call(node, aten.add.Tensor):
        return False
    terms = [argument(node, name) for name in ("self", "other")]
    return all(isinstance(t, Node) and shape(t).numel() < shape(node).numel() for t in terms)


def _is_number(node: Node) -> bool:
    """Whether `node` is one number, which needs no kernel of its own."""
    return shape(node).numel() == 1
