"""Packed heads without a bias get one of zeros."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.graph import argument, aten, calls, dtype, is_call, only_user, shape
from passes.ir import DEQUANTIZE
from passes.quantize.sites import linear_name

__all__ = ["BiasPackedHeads"]


class BiasPackedHeads(Pass):
    """Add zeros to the result of a quantized linear layer that is split into heads.

    Before:
        q, k, v = split(transpose(reshape(linear(x, w), [B,S,H,D]), 1, 2), [Hq,Hk,Hv], dim=1)
    After:
        q, k, v = split(transpose(reshape(linear(x, w, zeros), [B,S,H,D]), 1, 2), [Hq,Hk,Hv], dim=1)

    Requires: `SplitPackedHeads` and `MergeParallelLinears` ran.
    Ensures: the same numbers, but that a zero has no sign.
    Declines when: nothing.
    Why: what reads a bias TensorRT joins to one kernel behind the GEMM, for queries, keys and values together. Without
        one it makes two or three, or takes the GEMM itself apart: 9 kernels for each block of Llama in place of 10, of
        a ViT without bias 9 in place of 11.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.linear.default):
            if argument(node, "bias") is None and is_call(node.args[1], DEQUANTIZE) and _is_split(node):
                zeros = torch.zeros(int(shape(node)[-1]), dtype=dtype(node))
                node.args = (*node.args[:2], add_constant(gm, f"{linear_name(node)}.bias", zeros, node))
                self.fire()


def _is_split(linear: Node) -> bool:
    user = only_user(linear)
    while user is not None and is_call(user, aten.reshape.default, aten.transpose.int):
        user = only_user(user)
    return user is not None and is_call(user, aten.split_with_sizes.default) and len(shape(user.args[0])) == 4  # type: ignore[arg-type]
