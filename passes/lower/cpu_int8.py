"""Linear layers with INT8 codes on both sides become integer products."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import Emitter, aten, calls, shape
from passes.lower.kernels import note_kernel
from passes.lower.operands import (
    QuantizedLinear,
    add_bias,
    as_rows,
    float32_scale,
    is_one_scale,
    is_row_scale,
    like_input,
)

LONGEST = (2**31 - 1) // (128 * 128)  # of K: a sum of so many products of codes fits in int32 whatever the codes are


class IntegerProducts(Pass):
    """Multiply codes of INT8, and the sums by the scales.

    Before:
        y = linear(dequantize(q[...,K], sx), dequantize(codes[N,K], sw), bias)
    After:
        sums = _int_mm(reshape(q, [-1,K]), t(codes))    # int32
        y = to(add(mul(mul(float(sums), flatten(sw)), sx), bias), dtype)

    Requires: `FoldWeights` ran; sx one number or [...,1] (measured for each token), sw one number or [N,1].
    Ensures: every sum is exact, and is rounded to float32, multiplied by the scales and added to the bias there; half
        precision is rounded once, behind that, where the reference rounds each dequantized operand.
    Declines when: the scales of an operand lie along K, K is so long that a sum could overflow int32, or K is 1
        (`_int_mm` of torch 2.13 leaves its result unwritten then). Experts stay:
        there is no batched integer product.
    Why: on two cores of an EPYC with VNNI a [197,768] x [768,3072] product takes 1.2 ms, where the one in float32 takes
        8 ms, bfloat16 1.7 ms; the weight is read as it is stored.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.linear.default):
            linear = QuantizedLinear.read(node)
            if linear is None or not linear.format.storage == linear.weight_format.storage == torch.int8:
                continue
            if reason := _misfit(linear):
                self.decline(reason, node)
                continue
            self._rewrite(gm, linear)
            self.fire()

    def _rewrite(self, gm: GraphModule, linear: QuantizedLinear) -> None:
        emit = Emitter(linear.node)
        columns = emit(aten.t.default, linear.weight_codes)
        sums = emit(aten._int_mm.default, as_rows(emit, linear.codes), columns)
        note_kernel(sums, "_int_mm, INT8 codes", linear.name)
        result = emit(aten._to_copy.default, sums, dtype=torch.float32)
        for scale, sizes in ((linear.weight_scale, [-1]), (linear.scale, [-1, 1])):
            factor = emit(aten.reshape.default, float32_scale(gm, emit, scale), [] if is_one_scale(scale) else sizes)
            result = emit(aten.mul.Tensor, result, factor)
        result = add_bias(emit, result, linear.bias, linear.dtype)
        linear.node.replace_all_uses_with(like_input(emit, result, linear.codes))


def _misfit(linear: QuantizedLinear) -> str | None:
    """Why `linear` is no integer product, or None."""
    rows, length = linear.sizes
    if length == 1:
        return "K = 1, of which torch._int_mm makes wrong numbers on a CPU"
    if length > LONGEST:
        return f"K = {length}: sums of more than {LONGEST} products of INT8 codes can overflow int32"
    if not is_one_scale(linear.scale) and not is_row_scale(linear.scale, linear.codes):
        return "the input has more than one scale along K"
    if not is_one_scale(linear.weight_scale) and tuple(shape(linear.weight_scale)) != (rows, 1):
        return "the weight has more than one scale along K"
    return None
