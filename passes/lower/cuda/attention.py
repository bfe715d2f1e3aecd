"""Attention that is quantized runs in half precision."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, module_path, place_of, shape
from passes.ir import ATTENTION
from passes.lower.kernels import note_kernel
from passes.lower.operands import constants_read, forget_unread
from passes.reading import source_of
from passes.sdpa import SDPA, Attention, attention_scale


class AttentionToSdpa(Pass):
    """Compute quantized attention on its operands as they were before they were quantized.

    Before:
        y = qcompile.attention(dq(q(mul(x, a))), dq(q(k)), dq(q(v)), mask, s, is_causal=c)
        y = sdpa(dq(q(x)), dq(q(k)), dq(q(v)), mask, scale=a)           # probabilities are not quantized
    After:
        y = sdpa(x, k, v, mask, is_causal=c, scale=a, enable_gqa=...)

    Requires: nothing.
    Ensures: the result is that of the attention before it was quantized; it is not that of the quantized program. The
        dequantized tensors stay for their other users. `passes.lower.kernels` lists what was dropped.
    Declines when: the attention has a mask and is causal, too, which torch's operator does not take.
    Why: no attention kernel of torch takes FP8: on dequantized operands it would be the same kernel, and Q/DQ only cost
        time and accuracy. The factor goes back into the operator, which multiplies scores by it at no cost.
    """

    def rewrite(self, gm: GraphModule) -> None:
        before, fired = constants_read(gm), self.log.fired[self.name]
        for node in calls(gm.graph, ATTENTION, SDPA):
            sources = [source_of(operand) for operand in node.args[:3]]
            if node.target is SDPA and not any(source is not None for source in sources):
                continue
            if node.target is ATTENTION and node.kwargs["is_causal"] and node.args[3] is not None:
                self.decline("torch's attention takes no mask where it is causal", node)
                continue
            q, k, v = (_like(node, operand, source) for operand, source in zip(node.args[:3], sources, strict=True))
            new = _attention(node, q, k, v).replace(node)
            kernel = "scaled_dot_product_attention"
            note_kernel(new, kernel, module_path(new) or place_of(new), "q, k, v and probabilities are not quantized")
            self.fire()
        if self.log.fired[self.name] > fired:
            forget_unread(gm, before)


def _attention(node: Node, q: Node, k: Node, v: Node) -> Attention:
    if node.target is SDPA:
        attention = Attention.of(node)
        attention.q, attention.k, attention.v = q, k, v
        scale = attention_scale(node)
    else:
        mask = node.args[3]
        assert mask is None or isinstance(mask, Node)
        grouped = shape(q)[1] != shape(k)[1]
        attention = Attention(q, k, v, mask, 0.0, bool(node.kwargs["is_causal"]), 1.0, grouped)
        scale = 1.0
    factor = argument(q, "other") if is_call(q, aten.mul.Tensor) else None
    if scale == 1.0 and isinstance(factor, int | float):
        before = q.args[0]
        assert isinstance(before, Node)
        if dtype(before) == dtype(q):
            attention.q, scale = before, float(factor)
    attention.scale = scale
    return attention


def _like(node: Node, operand: object, source: Node | None) -> Node:
    """`source` in the dtype of `operand`, or `operand` if there is none."""
    assert isinstance(operand, Node)
    if source is None or dtype(source) == dtype(operand):
        return source if source is not None else operand
    return Emitter(node)(aten._to_copy.default, source, dtype=dtype(operand))
