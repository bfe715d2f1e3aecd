"""INT8 linear layers become integer matrix products."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.formats import INT8, INT8_PER_TOKEN
from passes.graph import Emitter, aten, shape
from passes.lower.linears import LinearLowering
from passes.lower.operands import (
    QuantizedLinear,
    add_bias,
    as_rows,
    first_rows,
    float32_scale,
    like_input,
    misaligned,
    pad_by,
)
from passes.lower.scaled_mm import describe, scale_product, unscalable

INT8_UNITS = (8, 0)
LEAST_ROWS = 17


class LinearsToIntMm(LinearLowering):
    """Multiply INT8 codes as integers, and scale the sums.

    Before:
        y = linear(dequantize(q, s), dequantize(w_codes, t), bias)
    After:
        z = _int_mm(reshape(q, [M,K]), t(w_codes))                      # int32
        y = reshape(float32(z) * s * t + bias, [...,N])                 # rounded once

    Requires: weights as codes.
    Ensures: sums of products are exact. With fewer than 17 rows, or a number of them that is not known, there are rows
        of zeros, whose results are cut off.
    Declines when: the device has no integer matrix units; K or N is no multiple of 8; a scale runs along K.
    Why: `_int_mm` of a CUDA device wants more than 16 rows.
    """

    def takes(self, linear: QuantizedLinear) -> bool:
        return linear.format in (INT8, INT8_PER_TOKEN) and linear.weight_format == INT8

    def reason(self, linear: QuantizedLinear) -> str | None:
        if not self.device.has(INT8_UNITS):
            return f"{describe(self.device)} is not known to multiply INT8 fast"
        return unscalable(linear) or misaligned(linear, 8, 8)

    def lower(self, gm: GraphModule, linear: QuantizedLinear) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        rows = as_rows(emit, linear.codes)
        weight = emit(aten.t.default, linear.weight_codes)
        product = emit(aten._int_mm.default, _enough_rows(emit, rows), weight)
        product = emit(aten._to_copy.default, first_rows(emit, product, rows), dtype=torch.float32)
        scaled = scale_product(gm, emit, linear, product, float32_scale(gm, emit, linear.scale))
        result = add_bias(emit, scaled, linear.bias, linear.dtype)
        return like_input(emit, result, linear.codes), "int_mm"


def _enough_rows(emit: Emitter, rows: Node) -> Node:
    count = shape(rows)[0]
    if statically_known_true(count >= LEAST_ROWS):
        return rows
    if isinstance(count, int):
        return pad_by(emit, rows, LEAST_ROWS - count)
    size, *_ = emit.sizes(rows)
    return pad_by(emit, rows, emit(torch.sym_max, emit(operator.sub, LEAST_ROWS, size), 0))
