"""Scales of a quantized linear layer: their shapes, and how they are applied to the products of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.constants import constant
from passes.graph import Emitter, aten, dtype, shape
from passes.lower.operands import constant_like
from passes.reading import QuantizedLayer


def is_one_scale(scale: Node) -> bool:
    """Whether `scale` is one number for the whole tensor."""
    return all(isinstance(size, int) and size == 1 for size in shape(scale))


def is_row_scale(scale: Node, values: Node) -> bool:
    """Whether `scale` is `[..., 1]` for `values` `[..., K]`."""
    sizes, lead = shape(scale), shape(values)[:-1]
    same = len(sizes) == len(lead) + 1 and sizes[-1] == 1
    return same and all(statically_known_true(a == b) for a, b in zip(sizes, lead, strict=False))


def runs_along_k(scale: Node) -> bool:
    """Whether `scale` differs along the last axis of what it scales."""
    return len(shape(scale)) > 0 and shape(scale)[-1] != 1


def unscalable(linear: QuantizedLayer) -> str | None:
    """Why the scales of `linear` cannot be applied to the products of codes, or None."""
    if runs_along_k(linear.weight.scale):
        return "the weight has scales along the reduction axis"
    if not is_one_scale(linear.x.scale) and not is_row_scale(linear.x.scale, linear.x.node):
        return "the input has neither one scale nor one for each row"
    return None


def float32_scale(gm: GraphModule, emit: Emitter, scale: Node) -> Node:
    """`scale` in float32: a constant stays one."""
    if dtype(scale) == torch.float32:
        return scale
    if constant(gm, scale) is not None:
        return constant_like(gm, emit.before, scale, torch.Tensor.float)
    return emit(aten._to_copy.default, scale, dtype=torch.float32)


def scale_product(gm: GraphModule, emit: Emitter, linear: QuantizedLayer, product: Node, scale: Node) -> Node:
    """The float32 sums `[M,N]` of products of codes times the `scale` of the input and that of the weight."""
    if not is_one_scale(linear.x.scale):
        scale = emit(aten.reshape.default, scale, [-1, 1])
    weight_scale = constant_like(gm, linear.node, linear.weight.scale, in_columns(linear))
    return emit(aten.mul.Tensor, emit(aten.mul.Tensor, product, scale), weight_scale)


def in_columns(linear: QuantizedLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes `[1, N]` in float32 of the weight's scale: one, or one for each row; of experts `[1, E*N]`."""
    lead = [int(size) for size in shape(linear.weight.node)[:-1]]

    def convert(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.float() if scale.ndim else scale.float().reshape(1)
        return scale.squeeze(-1).expand(lead).reshape(1, -1).contiguous()

    return convert
