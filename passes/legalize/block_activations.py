"""Activations in blocks of 1 x 128 that no linear layer with a weight in blocks reads."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from passes.base import Pass
from passes.blocks import measured_blocks
from passes.graph import Emitter, aten, calls, dtype, shape
from passes.ir import DEQUANTIZE
from passes.legalize.unit_blocks import unit_blocks


class SpellOutBlockActivations(Pass):
    """Write a dynamic quantize in blocks of 128 along the last axis with operators that any runtime has.

    Before:
        c, s = dynamic_quantize(x[...,K], format=fp8_1x128)
        y = dequantize(c, s)
    After, with n = ceil(K / 128):
        b = reshape(pad(x), [...,n,128])                        # in float32 up to the quantize, and in the product
        a = maximum(amax(abs(b), -1, keepdim), least) / 1.75
        p = dequantize(quantize(div(b, a), 2^-8), 2^-8)
        y = slice(reshape(mul(p, a), [...,128*n]), K)

    Requires: `SplitK` ran, which leaves what this is for: a layer whose weight is not quantized, an output quantizer.
    Ensures: the same codes.
    Declines when: never.
    Why: QuantizeLinear in blocks with scales from run time is an error in TensorRT. What reads the result runs in the
        compute dtype.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DEQUANTIZE):
            dynamic = measured_blocks(node)
            if dynamic is None or not node.users:
                continue
            values, size = unit_blocks(gm, dynamic)
            emit = Emitter(dynamic)
            if dtype(values) != torch.float32:
                values = emit(aten._to_copy.default, values, dtype=torch.float32)
            product = emit(aten.mul.Tensor, values, size)
            if dtype(node) != torch.float32:
                product = emit(aten._to_copy.default, product, dtype=dtype(node))
            width = int(shape(node)[-1])
            padded = int(shape(product)[-2] * shape(product)[-1])
            result = emit(aten.reshape.default, product, [*emit.sizes(product)[:-2], padded])
            if padded != width:
                result = emit(aten.slice.Tensor, result, -1, 0, width)
            node.replace_all_uses_with(result)
            self.fire()
