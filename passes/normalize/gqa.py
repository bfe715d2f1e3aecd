"""Give attention the key and value heads that exist instead of repeated copies."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.graph import argument, aten, calls, is_call, shape, strip
from passes.sdpa import SDPA, Attention

__all__ = ["UnexpandGroupedQuery"]


class UnexpandGroupedQuery(Pass):
    """Undo `repeat_kv` before an attention.

    Before:
        k' = reshape(expand(unsqueeze(k, 2), [B, Hkv, G, S, D]), [B, Hkv*G, S, D])      # v' the same
        y = sdpa(q, k', v')
    After:
        y = sdpa(q, k, v, enable_gqa=True)

    Requires: `ViewsToReshape` and `RemoveNoOps` ran (whole-axis slices and copies between these operators are gone).
    Ensures: the same values. The repeated copies stay for other users.
    Declines when: only one of k and v is repeated, or their numbers of heads differ before.
    Why: repeating costs memory and two kernels per layer, and hides k and v from the attention's quantizers.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            attention = Attention.of(node)
            if attention.enable_gqa:
                continue
            k, v = _unrepeated(attention.k), _unrepeated(attention.v)
            if k is None and v is None:
                continue
            if k is None or v is None:
                self.decline("only one of key and value has repeated heads", node)
            elif not statically_known_true(shape(k)[1] == shape(v)[1]):
                self.decline(f"key has {shape(k)[1]} heads before they are repeated and value {shape(v)[1]}", node)
            else:
                attention.k, attention.v, attention.enable_gqa = k, v, True
                attention.replace(node)
                self.fire()


def _unrepeated(node: Node) -> Node | None:
    """The tensor `[B, Hkv, S, D]` whose heads `node` `[B, Hkv*G, S, D]` holds G times each, side by side."""
    node = strip(node)
    if is_call(node, aten.repeat_interleave.self_int):
        source, repeats, axis = node.args[0], argument(node, "repeats"), argument(node, "dim")
        named = isinstance(source, Node) and isinstance(repeats, int) and axis in (1, -3) and len(shape(node)) == 4
        return source if named else None  # type: ignore[return-value]  # checked to be a Node
    if not is_call(node, aten.view.default, aten._unsafe_view.default, aten.reshape.default) or len(shape(node)) != 4:
        return None
    expanded = strip(node.args[0])  # type: ignore[arg-type]  # a view's input is a node
    if not is_call(expanded, aten.expand.default) or len(shape(expanded)) != 5:
        return None
    unsqueezed = strip(expanded.args[0])  # type: ignore[arg-type]
    if not is_call(unsqueezed, aten.unsqueeze.default) or argument(unsqueezed, "dim") not in (2, -3):
        return None
    source = unsqueezed.args[0]
    assert isinstance(source, Node)
    batch, heads, length, width = shape(source)
    groups = shape(expanded)[2]
    wanted = ((batch, heads, groups, length, width), (batch, heads * groups, length, width))
    for made, size in zip((expanded, node), wanted, strict=True):
        if not all(statically_known_true(a == b) for a, b in zip(shape(made), size, strict=True)):
            return None
    return source
