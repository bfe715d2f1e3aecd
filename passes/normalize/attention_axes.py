"""Attention on any number of axes becomes attention on four."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import Emitter, calls
from passes.normalize.attention_layout import Layout
from passes.sdpa import SDPA, Attention


class AttentionToFourAxes(Pass):
    """Bring `scaled_dot_product_attention` to `[B, H, S, D]`, with operands that broadcast written out.

    Before:
        y = sdpa(q[B,W,H,S,D], k, v, mask[W,1,S,S])                     # windows; two and three axes the same
        z = sdpa(q[1,H,S,D], k[B,H,T,D], v[B,H,T,D])                    # learned queries
    After:
        y = reshape(sdpa(reshape(q, [B*W,H,S,D]), ..., reshape(expand(mask), [B*W,1,S,S])), [B,W,H,S,D])
        z = sdpa(expand(q, [B,H,S,D]), k, v)

    Requires: nothing.
    Ensures: the same values; key and value that have one head for several of the query are grouped, not repeated.
    Declines when: never.
    Why: quantizers, ONNX and TensorRT's fused kernels know four axes only.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            attention = Attention.of(node)
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
