"""FP8 linear layers of experts become scaled matrix products."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.graph import Emitter, aten, shape
from passes.ir import BATCHED_LINEAR
from passes.lower.cuda.scaled_mm import LinearsToScaledMm, fp8_product, needs_scales_after, scaled_after
from passes.lower.operands import constant_like
from passes.lower.rows import add_bias
from passes.lower.scales import float32_scale, in_columns, is_one_scale
from passes.reading import QuantizedLayer

GROUPED_MM = aten._scaled_grouped_mm.default


class ExpertsToScaledMm(LinearsToScaledMm):
    """Multiply the FP8 codes of all experts at once.

    Before:
        y = batched_linear(dequantize(q[E|1,M,K], s), dequantize(w_codes[E,N,K], t), bias[E,N])
    After, where all read the same rows:
        z = _scaled_mm(q[0], t(reshape(w_codes, [E*N,K])), s, t, reshape(bias, [E*N]))      # as `LinearsToScaledMm`
        y = transpose(reshape(z, [M,E,N]), 0, 1)
    After, where each has its own:
        y = _scaled_grouped_mm(q, transpose(w_codes, -1, -2), s[E,M], t[E,N]) + unsqueeze(bias, -2)

    Requires: weights as codes.
    Ensures: the same codes, scaled before they are rounded.
    Declines when: `LinearsToScaledMm` would; rows are not shared, and the device is not Hopper or the result not
        bfloat16.
    Why: torch has the grouped product with scales for rows on 9.0 and with bfloat16 results only.
    """

    target = BATCHED_LINEAR

    def reason(self, linear: QuantizedLayer) -> str | None:
        if reason := super().reason(linear):
            return reason
        if shape(linear.x.codes)[0] == 1:
            return None
        if not self.device.is_hopper:
            return f"{self.device} has no grouped FP8 product, which torch has on Hopper alone"
        if linear.dtype != torch.bfloat16:
            return f"the grouped FP8 product gives bfloat16, and these experts compute in {linear.dtype}"
        return None

    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        if shape(linear.x.codes)[0] == 1:
            return self._joint(gm, emit, linear)
        weight = emit(aten.transpose.int, linear.weight.codes, -1, -2)
        experts, rows = int(shape(weight)[0]), int(shape(weight)[-1])
        scale, columns = _input_scale(gm, emit, linear), in_columns(linear)
        weight_scale = constant_like(
            gm, linear.node, linear.weight.scale, lambda scale: columns(scale).reshape(experts, rows)
        )
        product = emit(
            GROUPED_MM, linear.x.codes, weight, scale, weight_scale, None, None, None, linear.dtype, self.fast
        )
        bias = None if linear.bias is None else emit(aten.unsqueeze.default, linear.bias, -2)
        return add_bias(emit, product, bias, linear.dtype), "scaled_grouped_mm, scales of rows"

    def _joint(self, gm: GraphModule, emit: Emitter, linear: QuantizedLayer) -> tuple[Node, str]:
        """All experts read the same rows `[1,M,K]`."""
        experts, rows, width = (int(size) for size in shape(linear.weight.node))
        codes = emit(aten.squeeze.dim, linear.x.codes, 0)
        weight = emit(aten.reshape.default, linear.weight.codes, [-1, width])
        bias = None if linear.bias is None else emit(aten.reshape.default, linear.bias, [-1])
        product = scaled_after if needs_scales_after(self.device, linear) else fp8_product
        result, kernel = product(gm, emit, linear, codes, weight, bias, fast=self.fast)
        result = emit(aten.reshape.default, result, [-1, experts, rows])
        return emit(aten.transpose.int, result, 0, 1), kernel


def _input_scale(gm: GraphModule, emit: Emitter, linear: QuantizedLayer) -> Node:
    """Scales of the input `[E, M]`."""
    scale, (experts, count, _) = float32_scale(gm, emit, linear.x.scale), emit.sizes(linear.x.codes)
    if is_one_scale(linear.x.scale):
        scale = emit(aten.reshape.default, scale, [1, 1])
    else:
        scale = emit(aten.squeeze.dim, scale, -1)
    scale = emit(aten.expand.default, scale, [experts, count])
    return emit(aten.clone.default, scale, memory_format=torch.contiguous_format)
