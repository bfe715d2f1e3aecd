"""The queries that read one head of a cache side by side, for kernels that would have the cache once for each."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, shape
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.legalize.attention import quantize_of
from passes.state import is_returned

__all__ = ["GroupQueries"]


class GroupQueries(Pass):
    """Put the queries of all heads that share a head of keys into that head, where keys are a static cache.

    Before:
        y = qcompile.attention(dq(q(x[B,H,S,D])), k[B,G,L,D], v, mask[B,1,S,L], s)
    After:
        x = reshape(x, [B,G,H/G*S,D])
        y = qcompile.attention(dq(q(x)), k, v, repeat(mask, H/G), s)[B,G,H/G*S,D], reshape to [B,H,S,D]

    Requires: `FuseAttentionQdq` made the node.
    Ensures: the same values; masks are repeated once for all attentions that share one.
    Declines when: never; attention without grouped heads, without a mask, or of keys that are not given back or have no
        fixed length, stays.
    Why: TensorRT writes keys and values once for each head of queries before it attends to them in decode, which is
        eight bytes of traffic per element and token with four heads in a group, and two so. What is repeated here is
        of the size of the queries. (TensorRT-RTX 1.7.1, SM89 and SM120.)
    """

    def rewrite(self, gm: GraphModule) -> None:
        masks: dict[tuple[Node, int], Node] = {}
        for node in calls(gm.graph, ATTENTION):
            query, key, value, mask = node.args[:4]
            assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
            cached = all(is_returned(quantize_of(operand)) for operand in (key, value))
            if not cached or node.kwargs["is_causal"] or not isinstance(mask, Node):
                continue
            if shape(query)[1] == shape(key)[1] or shape(mask)[1] != 1 or not isinstance(shape(key)[2], int):
                continue
            self._group(node, masks)
            self.fire()

    def _group(self, node: Node, masks: dict[tuple[Node, int], Node]) -> None:
        query, key, value, mask, scale = node.args
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(mask, Node)
        heads, kept = int(shape(query)[1]), int(shape(key)[1])
        count = heads // kept
        if (mask, count) not in masks:
            masks[mask, count] = _repeated(mask, count)
        emit, codes = Emitter(node), quantize_of(query)
        batch, _, length, width = emit.sizes(query)
        rows = emit(aten.reshape.default, codes.args[0], [batch, kept, -1, width])
        rows = emit(QUANTIZE, rows, codes.args[1], **codes.kwargs)
        rows = emit(DEQUANTIZE, rows, codes.args[1], **query.kwargs)
        found = emit(ATTENTION, rows, key, value, masks[mask, count], scale, **node.kwargs)
        sizes = [batch, heads, length, shape(found)[-1]]
        node.replace_all_uses_with(emit(aten.reshape.default, found, sizes))
        node.graph.erase_node(node)


def _repeated(mask: Node, count: int) -> Node:
    """[B,1,S,L] -> [B,1,count*S,L], all of it `count` times."""
    emit = Emitter(mask.next, like=mask)
    batch, _, rows, columns = emit.sizes(mask)
    wide = emit(aten.expand.default, emit(aten.unsqueeze.default, mask, 2), [batch, 1, count, rows, columns])
    return emit(aten.reshape.default, wide, [batch, 1, -1, columns])
