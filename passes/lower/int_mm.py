"""INT8 linear layers become integer matrix products."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.capabilities import UNITS, inputs_of
from passes.compat import cpu_has_vnni
from passes.formats import INT8
from passes.graph import Emitter, aten, shape
from passes.lower.linears import LinearLowering
from passes.lower.operands import misaligned
from passes.lower.rows import add_bias, as_rows, first_rows, like_input, pad_by
from passes.lower.scales import float32_scale, scale_product, unscalable
from passes.reading import QuantizedLayer

LEAST_ROWS = 17  # of `_int_mm` on a CUDA device
LONGEST = (2**31 - 1) // (128 * 128)  # of K: a sum of so many products of codes fits in int32 whatever the codes are


def multiplies_int8() -> bool:
    """Whether integer products are fast on this CPU: oneDNN has them for x86 with VNNI; torch's own go one by one."""
    return cpu_has_vnni()


class LinearsToIntMm(LinearLowering):
    """Multiply INT8 codes as integers, and scale the sums.

    Before:
        y = linear(dequantize(q, s), dequantize(w_codes, t), bias)
    After:
        z = _int_mm(reshape(q, [M,K]), t(w_codes))                      # int32
        y = reshape(float32(z) * s * t + bias, [...,N])                 # rounded once

    Requires: weights as codes.
    Ensures: sums of products are exact; where the reference rounds each dequantized operand to half precision, only the
        result is. With fewer than 17 rows, or a number of them that is not known, a CUDA device gets rows of zeros,
        whose results are cut off.
    Declines when: a scale runs along K; K is so long that a sum could overflow int32. On a CUDA device: it has no
        integer matrix units; K or N is no multiple of 8. On a CPU: it has no VNNI; K is 1. Experts are not looked at:
        there is no batched integer product.
    Why: on two cores of an EPYC with VNNI a [197,768] x [768,3072] product takes 1.2 ms, where the one in float32 takes
        8 ms, bfloat16 1.7 ms; the weight is read as it is stored. On one without VNNI a [256,768] x [768,3072] product
        takes 600 ms, where the one in float32 takes 26 ms. The limits are those of `_int_mm` in torch 2.13,
        which on a CPU leaves its result unwritten where K is 1.
    """

    def takes(self, linear: QuantizedLayer) -> bool:
        return linear.weight.format == INT8 and linear.x.format in inputs_of(INT8)

    def reason(self, linear: QuantizedLayer) -> str | None:
        _, length = linear.sizes
        if length > LONGEST:
            return f"K = {length}: sums of more than {LONGEST} products of INT8 codes can overflow int32"
        if reason := unscalable(linear):
            return reason
        if self._is_cpu:
            if not multiplies_int8():
                return "this CPU has no VNNI, without which torch multiplies integers one by one"
            return "K = 1, of which torch._int_mm makes wrong numbers on a CPU" if length == 1 else None
        if not UNITS["int8"].on(self.device.capability):
            return f"{self.device} is not known to multiply INT8 fast"
        return misaligned(linear, 8, 8)

    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        rows = as_rows(emit, linear.x.codes)
        enough = rows if self._is_cpu else _enough_rows(emit, rows)
        product = emit(aten._int_mm.default, enough, emit(aten.t.default, linear.weight.codes))
        product = emit(aten._to_copy.default, first_rows(emit, product, rows), dtype=torch.float32)
        scaled = scale_product(gm, emit, linear, product, float32_scale(gm, emit, linear.x.scale))
        result = add_bias(emit, scaled, linear.bias, linear.dtype)
        return like_input(emit, result, linear.x.codes), "int_mm"

    @property
    def _is_cpu(self) -> bool:
        return self.device.type == "cpu"


def _enough_rows(emit: Emitter, rows: Node) -> Node:
    count = shape(rows)[0]
    if statically_known_true(count >= LEAST_ROWS):
        return rows
    if isinstance(count, int):
        return pad_by(emit, rows, LEAST_ROWS - count)
    size, *_ = emit.sizes(rows)
    return pad_by(emit, rows, emit(torch.sym_max, emit(operator.sub, LEAST_ROWS, size), 0))
