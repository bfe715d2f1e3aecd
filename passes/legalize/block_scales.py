"""Scales of blocks that are measured at run time, in standard operators."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.formats import get_format
from passes.graph import Emitter, aten, calls, dtype, is_call
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, LEAST_BLOCK_SCALE, QUANTIZE


class SpellOutBlockScales(Pass):
    """Write a dynamic quantize of two levels (NVFP4) with operators that any runtime has.

    Before:
        c, b = dynamic_quantize(x, g)
        y = dequantize(c, dequantize(b, g))
    After:
        u = div(amax(abs(reshape(x, [..., K/16, 16])), -1), 6 * g)
        b = quantize(where(u == 0, 1, clamp_min(u, 2^-9)), 1)
        s = dequantize(b, g)
        y = dequantize(quantize(x, s), s)

    Requires: `FoldWeights` ran, so that only activations are left.
    Ensures: the same codes and the same scales, bit by bit.
    Declines when: never.
    Why: it is the form for tools that do not know TensorRT's operator. TensorRT fuses it, too, with one kernel more,
        if `x` has the type of the scale; the guard in front of Q is part of the pattern.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DYNAMIC_QUANTIZE):
            if get_format(str(node.kwargs["format"])).scale is not None:
                self._rewrite(gm, node)
                self.fire()

    def _rewrite(self, gm: GraphModule, node: Node) -> None:
        fmt, (x, global_scale) = get_format(str(node.kwargs["format"])), node.args
        assert isinstance(x, Node) and isinstance(global_scale, Node) and fmt.scale is not None
        emit = Emitter(node)
        *lead, width = emit.sizes(x)
        block = fmt.block[-1]
        assert isinstance(width, int) and isinstance(block, int)
        blocks = emit(aten.reshape.default, x, [*lead, width // block, block])
        amax = emit(aten.amax.default, emit(aten.abs.default, blocks), [-1])
        if dtype(amax) != torch.float32:
            amax = emit(aten._to_copy.default, amax, dtype=torch.float32)
        unit = emit(aten.div.Tensor, amax, emit(aten.mul.Tensor, global_scale, fmt.max))
        one = add_constant(gm, "one", torch.tensor(1.0, dtype=torch.float32), node)
        least = emit(aten.clamp_min.default, unit, LEAST_BLOCK_SCALE)
        guarded = emit(aten.where.self, emit(aten.eq.Scalar, unit, 0), one, least)
        block_scales = emit(QUANTIZE, guarded, one, format=fmt.scale.name)
        scale = emit(DEQUANTIZE, block_scales, global_scale, format=fmt.scale.name, dtype=torch.float32)
        wide = x if dtype(x) == torch.float32 else emit(aten._to_copy.default, x, dtype=torch.float32)
        codes = emit(QUANTIZE, wide, scale, format=fmt.name)
        for part in list(node.users):
            for user in list(part.users):
                if part.args[1] == 1 and is_call(user, DEQUANTIZE):
                    user.replace_all_uses_with(scale)
            part.replace_all_uses_with(codes if part.args[1] == 0 else block_scales)
