"""Attention on any number of axes becomes attention on four."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, is_call, place_of, shape, swaps_last_two
from passes.normalize.attention_layout import Layout
from passes.sdpa import SDPA, Attention
from passes.subgraphs import all_calls


class AttentionToFourAxes(Pass):
    """Bring `scaled_dot_product_attention` to `[B, H, S, D]`, with operands that broadcast written out.

    Before:
        y = sdpa(q[B,W,H,S,D], k, v, mask[W,1,S,S])                     # windows; two and three axes the same
        z = sdpa(q[1,H,S,D], k[B,H,T,D], v[B,H,T,D])                    # learned queries
        w = sdpa(q[B,1,S,D], k, v, mask[B,1,S,S])                       # one head and a mask, of a static batch
    After:
        y = reshape(sdpa(reshape(q, [B*W,H,S,D]), ..., reshape(expand(mask), [B*W,1,S,S])), [B,W,H,S,D])
        z = sdpa(expand(q, [B,H,S,D]), k, v)
        w = transpose(sdpa(transpose(q, 0, 1), ..., transpose(mask, 0, 1)), 0, 1)

    The axis that three lack is added in front of a transpose, and goes behind one: `squeeze(transpose(y, -1, -2), 0)`.

    Requires: nothing.
    Ensures: the same values; key and value that have one head for several of the query are grouped, not repeated.
    Declines when: never.
    Why: quantizers, ONNX and TensorRT's fused kernels know four axes only; and between an attention and a transpose, of
        heads that a convolution makes, an axis that comes or goes hinders fusion.
    """

    def check_ensures(self, gm: GraphModule) -> list[str]:
        left = (node for node in all_calls(gm, SDPA) if any(len(shape(q)) != 4 for q in node.args[:3]))  # type: ignore[arg-type]
        return [f"the attention at {place_of(node)} has other axes" for node in left]

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            attention = Attention.of(node)
            if _is_one_masked_head(attention):
                _batch_as_heads(node, attention)
                self.fire()
                continue
            layout = Layout(attention.q, attention.k, attention.v, enable_gqa=attention.enable_gqa)
            if not layout.changes and layout.enable_gqa == attention.enable_gqa:
                continue
            emit = Emitter(before=node)
            laid_out = replace(
                attention,
                q=layout.query(attention.q, emit),
                k=layout.key(attention.k, emit),
                v=layout.value(attention.v, emit),
                mask=None if attention.mask is None else layout.mask(attention.mask, emit),
                enable_gqa=layout.enable_gqa,
            )
            node.replace_all_uses_with(layout.restore(laid_out.emit(emit), emit))
            gm.graph.erase_node(node)
            self.fire()
        for node in calls(gm.graph, SDPA):
            self.fire(_squeeze_behind_transposes(node))


def _is_one_masked_head(attention: Attention) -> bool:
    """Whether there is one head, of several samples, and a mask."""
    shapes = [shape(operand) for operand in (attention.q, attention.k, attention.v)]
    if attention.mask is None or any(len(sizes) != 4 for sizes in shapes):
        return False
    batch = shapes[0][0]
    return isinstance(batch, int) and batch > 1 and all(tuple(sizes[:2]) == (batch, 1) for sizes in shapes)


def _batch_as_heads(node: Node, attention: Attention) -> None:
    """Put the attention in the place of `node` with its samples as the heads of one."""
    emit = Emitter(before=node)
    q, k, v = (emit(aten.transpose.int, operand, 0, 1) for operand in (attention.q, attention.k, attention.v))
    mask = attention.mask
    if mask is not None and len(shape(mask)) == 4:
        mask = emit(aten.transpose.int, mask, 0, 1)
    turned = replace(attention, q=q, k=k, v=v, mask=mask).emit(emit)
    node.replace_all_uses_with(emit(aten.transpose.int, turned, 0, 1))
    node.graph.erase_node(node)


def _squeeze_behind_transposes(attention: Node) -> int:
    """Where `attention` loses its first or second axis and is then transposed, let it lose it behind the transpose; how
    many such transposes there are."""
    squeezes = [user for user in attention.users if is_call(user, aten.squeeze.dim) and int(user.args[1]) % 4 < 2]  # type: ignore[arg-type]
    transposes = [(user, squeeze.args[1]) for squeeze in squeezes for user in squeeze.users if swaps_last_two(user)]
    for transpose, axis in transposes:
        emit = Emitter(transpose)
        turned = emit(aten.transpose.int, attention, -1, -2)
        transpose.replace_all_uses_with(emit(aten.squeeze.dim, turned, axis))
    return len(transposes)
