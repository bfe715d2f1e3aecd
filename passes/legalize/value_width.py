"""Quantized attention whose values are as wide as its queries and keys."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, dtype, shape
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.legalize.attention import quantize_of

__all__ = ["PadHeadWidths"]


class PadHeadWidths(Pass):
    """Pad the narrower of keys and values with zeros, so that both have one width.

    Before:
        y = qcompile.attention(qdq(q), qdq(k), qdq(v), mask, s)         # k [B,H,S,192], v [B,H,S,128]
    After:
        y = slice(qcompile.attention(qdq(q), qdq(k), qdq(cat(v, zeros)), mask, s), -1, 0, 128)

    Values wider than the keys: queries and keys are padded, which leaves their products as they are.

    Requires: `FuseAttentionQdq` made the node, so q, k and v are dequantizes of quantizes.
    Ensures: the same codes and zeros beside them, so the same result.
    Declines when: a width is not static.
    Why: TensorRT fuses attention of one width only, and its quantized-attention operator takes no other; multi-head
        latent attention (DeepSeek) has values of 128 beside keys of 192. (TensorRT takes the width of a Pad for
        unknown where another axis is dynamic, so zeros are concatenated.)
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, ATTENTION):
            keys, values = (shape(operand)[-1] for operand in node.args[1:3])  # type: ignore[arg-type]  # both are nodes
            if not (isinstance(keys, int) and isinstance(values, int)):
                self.decline("the width of its heads is dynamic", node)
                continue
            if keys == values:
                continue
            for index in (2,) if values < keys else (0, 1):
                node.update_arg(index, _padded(node.args[index], max(keys, values), node))
            if values < keys:
                self._keep(node, values, keys)
            self.fire()

    def _keep(self, node: Node, values: int, width: int) -> None:
        """Cut the result `[..., width]` of `node` down to the width that the values had."""
        node.meta["val"] = node.meta["val"].new_empty((*shape(node)[:-1], width))
        kept = Emitter(node.next, like=node)(aten.slice.Tensor, node, -1, 0, values)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)


def _padded(operand: object, width: int, user: Node) -> Node:
    """Q/DQ of the tensor behind `operand` with zeros up to `width`, made before `user`."""
    assert isinstance(operand, Node)
    codes = quantize_of(operand)
    source, scale = codes.args
    assert isinstance(source, Node)
    emit = Emitter(user, like=codes)
    sizes = [*emit.sizes(source)[:-1], width - shape(source)[-1]]
    padded = emit(aten.cat.default, [source, emit(aten.full.default, sizes, 0.0, dtype=dtype(source))], -1)
    return emit(DEQUANTIZE, emit(QUANTIZE, padded, scale, **codes.kwargs), scale, **operand.kwargs)
