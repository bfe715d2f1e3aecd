"""Activations in FP4 without packing: what is quantized and dequantized at once is only rounded."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.formats import Format, get_format
from passes.graph import Emitter, aten, calls, dtype
from passes.ir import DEQUANTIZE
from passes.lower.fp4_codes import blocks_and_scales
from passes.reading import Operand


class RoundFp4Activations(Pass):
    """Round to FP4 where a tensor is quantized and dequantized at once.

    Before:
        c, b = dynamic_quantize(x[...,K], g, format=nvfp4)
        y = dequantize(c, dequantize(b, g))
    After:
        blocks = reshape(float(x), [...,K/16,16])
        b = quantize(where(t == 0, 1, maximum(t, 2^-9)), 1) of t = amax(abs(blocks)) / (6 g)
        s = unsqueeze(dequantize(b, g))
        y = reshape(to(rounded(blocks / s) * s, dtype))     # rounded: to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives

    Requires: nothing.
    Ensures: the same values, bit for bit.
    Declines when: never.
    Why: codes of four bits are packed and unpacked for nothing, and the table that reads them is no vector instruction.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DEQUANTIZE):
            operand = Operand(node)
            dynamic = operand.measured
            if dynamic is None or not operand.format.is_fp4 or operand.global_scale is not dynamic.args[1]:
                continue  # the last: block scales that something else made
            self._rewrite(gm, node, dynamic)
            self.fire()

    def _rewrite(self, gm: GraphModule, node: Node, dynamic: Node) -> None:
        x, global_scale = dynamic.args
        assert isinstance(x, Node) and isinstance(global_scale, Node)
        fmt, emit = get_format(str(dynamic.kwargs["format"])), Emitter(node)
        blocks, _, scale = blocks_and_scales(emit, x, global_scale, fmt)
        rounded = _rounded(emit, emit(aten.div.Tensor, blocks, scale), fmt)
        result = emit(aten.reshape.default, emit(aten.mul.Tensor, rounded, scale), emit.sizes(x))
        node.replace_all_uses_with(emit(aten._to_copy.default, result, dtype=dtype(node)))


def _rounded(emit: Emitter, x: Node, fmt: Format) -> Node:
    """fp32 -> the nearest number of e2m1, ties to even codes; what is negative keeps its sign where it becomes 0."""
    size = emit(aten.clamp_max.default, emit(aten.abs.default, x), fmt.max)
    result = None
    for limit, step in ((None, 2.0), (4, 1.0), (2, 0.5)):  # the distance of two numbers below each limit
        steps = emit(aten.round.default, emit(aten.mul.Tensor, size, 1 / step))
        value = emit(aten.mul.Tensor, steps, step)
        result = value if limit is None else emit(aten.where.self, emit(aten.lt.Scalar, size, limit), value, result)
    assert result is not None
    return emit(aten.where.self, emit(aten.lt.Scalar, x, 0), emit(aten.neg.default, result), result)
