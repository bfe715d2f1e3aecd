"""Group norms of small groups as sums and products."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, shape

__all__ = ["SpellOutGroupNorm"]

_ELEMENTS = 12288  # of a group, as float32 the 48 KiB that a kernel shares


class SpellOutGroupNorm(Pass):
    """Write a group norm with its mean and its variance, where a kernel of TensorRT has room for a group.

    Before (x [N, C, ...]):
        y = group_norm(x, g, w, b, eps)
    After, in float32 for half precision:
        f = reshape(to(x, fp32), [N, g, C / g * ...])
        c = f - mean(f, -1)
        n = reshape(c / sqrt(mean(c * c, -1) + eps), [N, C, ...])
        y = to(n * w[C, 1, ...] + b[C, 1, ...], fp16)

    Requires: nothing.
    Ensures: the same values within rounding.
    Declines when: never. Groups of more than 12,288 elements, or of a number that inputs decide, stay whole where x has
        more than two axes.
    Why: TensorRT 1.7.1 fuses it with what is in front and behind, a Q for one, into one kernel; its own kernel for
        GroupNormalization takes two or three. Of larger groups the sums take kernels of their own. A tensor of two
        axes it refuses there.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.group_norm.default):
            x = argument(node, "input")
            groups = argument(node, "num_groups")
            assert isinstance(x, Node) and isinstance(groups, int)
            size = math.prod(shape(x)[1:])
            length = size // groups if isinstance(size, int) else -1
            if len(shape(x)) == 2 or 0 <= length <= _ELEMENTS:
                node.replace_all_uses_with(_spelled_out(node, x, groups, length))
                self.fire()


def _spelled_out(node: Node, x: Node, groups: int, length: int) -> Node:
    emit = Emitter(node)
    sizes, half = emit.sizes(x), dtype(x) in (torch.float16, torch.bfloat16)
    wide = emit(aten._to_copy.default, x, dtype=torch.float32) if half else x
    rows = emit(aten.reshape.default, wide, [sizes[0], groups, length])
    centred = emit(aten.sub.Tensor, rows, emit(aten.mean.dim, rows, [-1], True))
    variance = emit(aten.mean.dim, emit(aten.mul.Tensor, centred, centred), [-1], True)
    deviation = emit(aten.sqrt.default, emit(aten.add.Tensor, variance, argument(node, "eps")))
    result = emit(aten.reshape.default, emit(aten.div.Tensor, centred, deviation), sizes)
    for name, operator in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if (affine := argument(node, name)) is not None:
            factor = emit(aten.reshape.default, affine, [-1] + [1] * (len(sizes) - 2))
            result = emit(operator, result, emit(aten._to_copy.default, factor, dtype=dtype(wide)) if half else factor)
    return emit(aten._to_copy.default, result, dtype=dtype(x)) if half else result
