"""Quantizers with a zero point, said with one that has none: an addition before it, a subtraction behind."""

from __future__ import annotations

from torch.fx import Node

from passes.formats import INT8
from passes.graph import Emitter, aten


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
