"""Quantizers with a zero point, said with one that has none: an addition before it, a subtraction behind."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.constants import constant
from passes.formats import INT8
from passes.graph import Emitter, aten, is_call
from passes.ir import DEQUANTIZE, QUANTIZE


def to_symmetric(x: Node, scale: float, zero_point: int, low: int, high: int, emit: Emitter) -> Node:
    """What to quantize symmetrically, so that the codes are those of `x` with a zero point.

    `clamp(round(x / s) + z, low, high)` is `round((clamp(x, s (low - z), s (high - z)) + s z) / s)`, up to ties where z
    is odd. `low` and `high` lie in -128 ... 127: uint8 is shifted by 128 before.
    """
    if (low, high) != (INT8.min, INT8.max):
        x = emit(aten.clamp.default, x, scale * (low - zero_point), scale * (high - zero_point))
    return emit(aten.add.Tensor, x, scale * zero_point) if zero_point else x


def from_symmetric(x: Node, scale: float, zero_point: int, emit: Emitter) -> Node:
    """`s q - s z` of the dequantized `x` = `s q`: what `MoveZeroPoints` looks for."""
    return emit(aten.sub.Tensor, x, scale * zero_point) if zero_point else x


def quantized_path(gm: GraphModule, operand: object) -> list[Node]:
    """What quantizes `operand`, first to last: perhaps an addition, quantize, dequantize, and then a subtraction."""
    path: list[Node] = []
    for kind in (aten.sub.Tensor, DEQUANTIZE, QUANTIZE, aten.add.Tensor):
        if isinstance(operand, Node) and is_call(operand, kind):
            is_offset = kind in (aten.sub.Tensor, aten.add.Tensor)
            if is_offset and not isinstance(operand.args[1], float):
                break
            path.insert(0, operand)
            operand = operand.args[0]
        elif kind in (DEQUANTIZE, QUANTIZE):
            return []
    scales = [constant(gm, step.args[1]) for step in path if is_call(step, QUANTIZE)]
    shifted = is_call(path[0], aten.add.Tensor) == is_call(path[-1], aten.sub.Tensor)
    return path if shifted and all(scale is not None and scale.numel() == 1 for scale in scales) else []


def applied_before(step: Node, path: list[Node], place: Node) -> Node:
    """What `path` makes, in front of `place`, of what `step` makes of what it quantizes: `step` moves to its front."""
    assert callable(step.target)
    result = Emitter(place, like=step)(step.target, path[0].args[0], *step.args[1:], **step.kwargs)
    for part in path:
        assert callable(part.target)
        made = Emitter(place, like=part)(part.target, result, *part.args[1:], **part.kwargs)
        made.meta["custom"] = dict(part.meta.get("custom", {}))
        result = made
    return result
