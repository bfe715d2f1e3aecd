"""Attention with Q/DQ on q, k and v becomes one node whose probabilities are quantized too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.formats import get_format
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, name_in_module, shape, val
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA, attention_scale


class FuseAttentionQdq(Pass):
    """Quantize the probabilities of an attention whose q, k and v are quantized.

    Before:
        y = sdpa(dq(q), dq(k), dq(v), mask, is_causal=c, scale=1.0)
    After:
        y = qcompile.attention(dq(q), dq(k), dq(v), additive_mask, 1/448, is_causal=c)

    Requires: `PlaceAttentionScale` ran; masks are normalized.
    Ensures: the probabilities are quantized per tensor, at 1 / format.max if not told otherwise; a boolean mask becomes
        an additive one, made once for all attentions that share it.
    Declines when: one of q, k and v is not quantized with a constant scale, or has other axes than [B,H,S,D]; formats
        differ; the softmax quantizer is off; scale is not 1; or there is dropout.
    Why: TensorRT fuses no FP8 attention without Q/DQ on the softmax output. Probabilities are at most 1, so the scale
        needs no calibration.
    """

    def __init__(self, softmax: Mapping[Node, torch.Tensor] | None = None) -> None:
        """`softmax` has the scale of each attention whose softmax quantizer is on; None stands for all of them."""
        super().__init__()
        self.softmax = softmax

    def rewrite(self, gm: GraphModule) -> None:
        masks: dict[tuple[Node, torch.dtype], Node] = {}
        for node in calls(gm.graph, SDPA):
            formats = [_format(operand) for operand in node.args[:3]]
            if not any(formats):
                continue
            reason = self._reason(node, formats)
            if reason:
                self.decline(reason, node)
                continue
            self._rewrite(gm, node, str(formats[0]), masks)
            self.fire()

    def _reason(self, node: Node, formats: list[str | None]) -> str | None:
        """Why `node` cannot be rewritten, or None."""
        missing = [name for name, fmt in zip("qkv", formats, strict=True) if fmt is None]
        if missing:
            return f"{' and '.join(missing)} of this attention is not quantized"
        if argument(node, "dropout_p"):
            return "this attention draws dropout"
        unfit = [reason for name, operand in zip("qkv", node.args, strict=False) if (reason := _unfit(name, operand))]
        if unfit:
            return unfit[0]
        if len(set(formats)) > 1:
            return f"q, k and v are quantized to different formats: {', '.join(map(str, formats))}"
        if self.softmax is not None and node not in self.softmax:
            return "the softmax quantizer is off, so no attention kernel with quantized inputs applies"
        if attention_scale(node) != 1.0:
            return "the attention scale is not applied to q before its quantizer"
        return None

    def _rewrite(self, gm: GraphModule, node: Node, fmt: str, masks: dict[tuple[Node, torch.dtype], Node]) -> None:
        query, key, value = node.args[:3]
        assert isinstance(query, Node)
        emit = Emitter(node)
        mask = argument(node, "attn_mask")
        if mask is not None:
            mask = _additive(mask, dtype(query), masks, emit)
        largest = get_format(fmt).max
        softmax_scale = (
            self.softmax[node] if self.softmax is not None else torch.tensor(1 / largest, dtype=torch.float32)
        )
        scale = add_constant(gm, name_in_module(node, "softmax_scale"), softmax_scale, node)
        causal = bool(argument(node, "is_causal"))
        fused = emit(ATTENTION, query, key, value, mask, scale, is_causal=causal, format=fmt)
        node.replace_all_uses_with(fused)
        gm.graph.erase_node(node)  # dead code elimination keeps it: SDPA could draw dropout


def _format(operand: object) -> str | None:
    """Name of the format that an operand was dequantized from, or None for a float operand."""
    if not is_call(operand, DEQUANTIZE):
        return None
    assert isinstance(operand, Node)
    return str(operand.kwargs["format"])


def _unfit(name: str, operand: object) -> str | None:
    """Why the dequantized `operand` cannot be an operand of the fused node, or None."""
    assert isinstance(operand, Node)
    codes = operand.args[0]
    if len(shape(operand)) != 4:
        return f"{name} has {len(shape(operand))} axes instead of batch, heads, length and width"
    if not isinstance(codes, Node) or not is_call(codes, QUANTIZE):
        return f"{name} is not quantized with a constant scale"
    return None


def _additive(mask: Node, to: torch.dtype, made: dict[tuple[Node, torch.dtype], Node], emit: Emitter) -> Node:
    """`mask` as something to add to the scores: a boolean one becomes 0 where True and very negative elsewhere.

    Half the lowest finite number stays finite when a score is added to it, so a row that is masked as a whole gives
    an average of values and not NaN, where `ZeroMaskedRows` has not been told of it.
    """
    if val(mask).dtype != torch.bool:
        return mask
    key = (mask, to)
    if key not in made:
        first = Emitter(mask.next, like=emit.like)
        zero = first(aten.full.default, [], 0.0, dtype=to)
        lowest = first(aten.full.default, [], torch.finfo(to).min / 2, dtype=to)
        made[key] = first(aten.where.self, mask, zero, lowest)
    return made[key]
