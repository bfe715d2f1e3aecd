"""Views that depend on strides become reshapes, which do not, and say the sizes that are known."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from passes.base import Pass
from passes.graph import aten, calls, shape


class ViewsToReshape(Pass):
    """Rewrite `view` and `_unsafe_view` as `reshape`, with every static size written out.

    Before:
        y = view(x, [b, s, -1, 64])
    After:
        y = reshape(x, [b, s, 8, 64])

    Requires: a functional graph.
    Ensures: the same values; the graph no longer depends on the strides of any tensor.
    Declines when: never.
    Why: a pass may replace an operator by one of the same values in another memory layout (attention does), and a
        `view` behind it would fail. ONNX and TensorRT have reshapes only, and where b and s are dynamic TensorRT does
        not find out by itself that -1 stands for 8 heads.
    """

    clears = (aten.view.default, aten._unsafe_view.default)

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            sizes = _with_static(node)
            if node.target is not aten.reshape.default or sizes is not None:
                node.target = aten.reshape.default
                if sizes is not None:
                    node.update_arg(1, sizes)
                self.fire()


def _with_static(node: Node) -> list[Argument] | None:
    """The sizes that `node` asks for with the number in the place of -1; None if there is no -1 or no number."""
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    known = [made if asked == -1 else asked for asked, made in zip(sizes, shape(node), strict=True)]
    changed = any(asked == -1 and isinstance(size, int) for asked, size in zip(sizes, known, strict=True))
    return known if changed else None
