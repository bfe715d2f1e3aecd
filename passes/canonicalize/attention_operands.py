"""Quantized queries, keys and values that are rearranged before their attention."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import constant, constant_before
from passes.graph import TRANSPARENT, Emitter, aten, calls, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA

_LAYOUT = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    *TRANSPARENT,
)


class MoveQuantizersToAttention(Pass):
    """Quantize the operands of an attention right before it.

    Before:
        y = sdpa(q, transpose(reshape(dequantize(quantize(k, s), s), [B,S,H,D]), 1, 2), v)
    After:
        k' = transpose(reshape(k, [B,S,H,D]), 1, 2)
        y = sdpa(q, dequantize(quantize(k', s), s), v)

    Requires: normalized attention (heads that were repeated behind the quantizer are unexpanded already).
    Ensures: the same values: one scale for the tensor does not care for its layout. Other readers keep theirs.
    Declines when: never; quantizers with more than one scale stay.
    Why: other tools quantize where their module hands the tensor on, and `FuseAttentionQdq` looks at the operands.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            for index in range(3):
                path = _path(node.args[index])
                source = path[-1].args[0] if path else None
                if is_call(source, DEQUANTIZE) and _is_per_tensor(gm, source):
                    assert isinstance(source, Node)
                    node.update_arg(index, _moved(node, source, path))
                    self.fire()


def _path(operand: object) -> list[Node]:
    """The layout operators that make `operand`, last one first."""
    path = []
    while isinstance(operand, Node) and is_call(operand, *_LAYOUT):
        path.append(operand)
        operand = operand.args[0]
    return path


def _is_per_tensor(gm: GraphModule, node: object) -> bool:
    assert isinstance(node, Node)
    scale = constant(gm, node.args[1])
    return scale is not None and scale.ndim == 0 and is_call(node.args[0], QUANTIZE)


def _moved(attention: Node, dequantize: Node, path: list[Node]) -> Node:
    codes, scale = dequantize.args
    assert isinstance(codes, Node) and isinstance(scale, Node)
    x = codes.args[0]
    emit = Emitter(attention)
    for step in reversed(path):
        assert callable(step.target)
        x = Emitter(attention, like=step)(step.target, x, *step.args[1:], **step.kwargs)
    copy = constant_before(scale, attention)
    quantized = emit(QUANTIZE, x, copy, **codes.kwargs)
    result = emit(DEQUANTIZE, quantized, copy, **dequantize.kwargs)
    for new, old in ((quantized, codes), (result, dequantize)):
        new.meta["custom"] = dict(old.meta.get("custom", {}))
    return result
