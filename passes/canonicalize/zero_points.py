"""The zero point of a linear layer's input moves into its bias."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import ConstantRows, add_constant, constant, evaluate_constant, is_constant_expression
from passes.formats import get_format
from passes.graph import aten, calls, is_call, name_in_module, val
from passes.ir import DEQUANTIZE, QUANTIZE, dequantize, quantize


class MoveZeroPoints(Pass):
    """Subtract what a zero point adds to the input of a linear layer from its result.

    Before:
        y = linear(sub(dequantize(q, s), s * z), dequantize(w8, sw), b)
    After:
        y = linear(dequantize(q, s), dequantize(w8, sw), b - s * z * sum(w8 * sw, -1))

    Requires: zero points as a subtraction of a number (`Pt2eToQdq`, `ModeloptToQdq`).
    Ensures: the same sums, in another order.
    Declines when: the weight or the bias is computed at run time.
    Why: a back end takes a GEMM of integers only where dequantize is right before it, and ONNX in half precision has no
        integer zero point that TensorRT would fuse.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for linear in calls(gm.graph, aten.linear.default):
            source = linear.args[0]
            if not is_call(source, aten.sub.Tensor) or not is_call(source.args[0], DEQUANTIZE):  # type: ignore[union-attr]
                continue
            dequantized, offset = source.args  # type: ignore[union-attr]
            if not isinstance(offset, float):
                continue
            sums = _row_sums(gm, linear.args[1])
            bias = linear.args[2] if len(linear.args) > 2 else None
            if sums is None or (bias is not None and not is_constant_expression(bias)):
                self.decline("an input with a zero point meets a weight or bias that is computed at run time", linear)
                continue
            correction = -offset * sums
            if isinstance(bias, Node):
                correction += evaluate_constant(gm, bias).double()
            name = (
                str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else name_in_module(linear, "bias")
            )
            corrected = torch.nn.Parameter(correction.to(val(linear).dtype), requires_grad=False)
            linear.args = (dequantized, linear.args[1], add_constant(gm, name, corrected, linear))
            self.fire()


def _row_sums(gm: GraphModule, weight: object) -> torch.Tensor | None:
    """Sum over the inputs of the weight as it is dequantized, `[N]` float64; None if it is not a constant."""
    if not isinstance(weight, Node):
        return None
    if is_constant_expression(weight):
        return evaluate_constant(gm, weight).double().sum(-1)
    if not is_call(weight, DEQUANTIZE):
        return None
    source, scale = weight.args[0], constant(gm, weight.args[1])
    quantized = is_call(source, QUANTIZE)
    if quantized:
        assert isinstance(source, Node)
        source = source.args[0]
    if scale is None or not isinstance(source, Node) or not is_constant_expression(source):
        return None
    fmt = get_format(str(weight.kwargs["format"]))
    if fmt.sizes:
        return None
    sums = []
    for rows, values in ConstantRows(gm, source):
        own = scale[rows] if scale.ndim and scale.shape[0] > 1 else scale
        codes = quantize(values, own, format=fmt.name) if quantized else values
        sums.append(dequantize(codes, own, format=fmt.name, dtype=torch.float64).sum(-1))
    return torch.cat(sums)
