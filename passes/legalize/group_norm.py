"""Group norms of tensors without a length."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, shape

__all__ = ["LengthenGroupNorm"]


class LengthenGroupNorm(Pass):
    """Give the input of a group norm that has rows and channels alone an axis of length 1.

    Before:
        y = group_norm(x, 8, w, b)                                  # [N,C]
    After:
        y = squeeze(group_norm(unsqueeze(x, -1), 8, w, b), -1)

    Requires: nothing.
    Ensures: bit-equal values.
    Declines when: never.
    Why: TensorRT 1.7.1 refuses a GroupNormalization of less than three axes.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.group_norm.default):
            x = node.args[0]
            assert isinstance(x, Node)
            if len(shape(x)) == 2:
                emit = Emitter(node)
                normed = emit(
                    aten.group_norm.default, emit(aten.unsqueeze.default, x, -1), *node.args[1:], **node.kwargs
                )
                node.replace_all_uses_with(emit(aten.squeeze.dim, normed, -1))
                self.fire()
