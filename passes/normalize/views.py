"""Views that depend on strides become reshapes, which do not."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import aten, calls


class ViewsToReshape(Pass):
    """Rewrite `view` and `_unsafe_view` as `reshape`.

    Before:
        y = view(x, shape)
    After:
        y = reshape(x, shape)

    Requires: a functional graph.
    Ensures: the same values; the graph no longer depends on the strides of any tensor.
    Declines when: never.
    Why: a pass may replace an operator by one of the same values in another memory layout (attention does), and a
        `view` behind it would fail. ONNX and TensorRT have reshapes only.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            self.fire()
