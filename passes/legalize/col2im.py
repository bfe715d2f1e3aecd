"""Patches that are summed where they overlap: `nn.Fold`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.graph import Emitter, argument, aten, calls, dtype, name_in_module, shape

__all__ = ["FoldToConvolution"]


class FoldToConvolution(Pass):
    """Sum patches by a transposed convolution that puts each of their elements in its place.

    Before, patches of K1 x K2 at L1 x L2 places:
        y = col2im(x[N, C*K1*K2, L1*L2], [H,W], [K1,K2], dilation, padding, stride)
    After:
        place = eye(K1*K2) as [C*K1*K2, 1, K1, K2]
        y = convolution(reshape(x, [N, C*K1*K2, L1, L2]), place, transposed, groups=C)

    Requires: nothing.
    Ensures: the same sums, in another order.
    Declines when: the size of the result, or the number of channels, is dynamic.
    Why: TensorRT-RTX 1.7.1 has no Col2Im (outlook attention of VOLO, overlapping tiles).
    """

    clears = (aten.col2im.default,)

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.col2im.default):
            x, output = node.args[0], argument(node, "output_size")
            assert isinstance(x, Node)
            if all(isinstance(size, int) for size in (*output, shape(x)[-2])):
                node.replace_all_uses_with(_convolution(gm, node, x))
                self.fire()
            else:
                self.decline("its channels, or the size of its result, are dynamic", node)


def _convolution(gm: GraphModule, node: Node, x: Node) -> Node:
    names = ("output_size", "kernel_size", "dilation", "padding", "stride")
    sizes = [argument(node, name) for name in names]
    output, kernel, dilation, padding, stride = ([int(size) for size in pair] for pair in sizes)
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    places = [(size - r) // s + 1 for size, r, s in zip(output, reach, stride, strict=True)]
    left = [size - ((n - 1) * s + r) for size, n, s, r in zip(output, places, stride, reach, strict=True)]
    rows, area = int(shape(x)[-2]), math.prod(kernel)
    place = torch.eye(area, dtype=dtype(x)).reshape(area, 1, *kernel).repeat(rows // area, 1, 1, 1)
    emit = Emitter(node)
    batch: Any = emit.sizes(x)[0] if len(shape(x)) == 3 else 1
    patches = emit(aten.reshape.default, x, [batch, rows, *places])
    weight = add_constant(gm, name_in_module(node, "places"), place, node)
    arguments = (None, stride, padding, dilation, True, left, rows // area)
    result = emit(aten.convolution.default, patches, weight, *arguments)
    return result if len(shape(x)) == 3 else emit(aten.squeeze.dim, result, 0)
