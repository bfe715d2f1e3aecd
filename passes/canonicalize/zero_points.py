"""The zero point of a layer's input moves into its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import ConstantRows, add_constant, constant, evaluate_constant, is_constant_expression
from passes.formats import get_format
from passes.graph import Emitter, argument, aten, calls, is_call, name_in_module, val
from passes.ir import DEQUANTIZE, QUANTIZE, dequantize, quantize

_INPUT = "an input with a zero point meets a weight or bias that is computed at run time"
_EDGES = "at the edge of a transposed convolution fewer products are added, so that no bias is what a zero point adds"


class MoveZeroPoints(Pass):
    """Subtract what a zero point adds to the input of a linear layer or convolution from its result.

    Before:
        y = linear(sub(dequantize(q, s), s * z), dequantize(w8, sw), b)
        u = convolution(sub(dequantize(quantize(add(x, s * z), s), s), s * z), dequantize(v8, sv), b, ...)   # pads
    After:
        y = linear(dequantize(q, s), dequantize(w8, sw), b - s * z * sum(w8 * sw, -1))
        p = constant_pad_nd(x, ...)
        u = convolution(dequantize(quantize(add(p, s * z), s), s), dequantize(v8, sv), b - ..., ...)   # pads nothing

    Requires: zero points as a subtraction of a number (`Pt2eToQdq`, `ModeloptToQdq`); `NormalizeConvolution` ran.
    Ensures: the same sums, in another order.
    Declines when: the weight or the bias is computed at run time; a convolution is transposed, or pads codes that
        nothing in the graph makes.
    Why: a back end multiplies integers only where dequantize is right before it, and ONNX in half precision has no
        integer zero point that TensorRT would fuse. The zeros that a convolution pads with are codes of z: padded in
        front of the quantizer they are, and TensorRT pads in the kernel that quantizes.
    """

    def rewrite(self, gm: GraphModule) -> None:
        padded: dict[tuple[Node, tuple[int, ...]], Node] = {}
        for layer in calls(gm.graph, aten.linear.default, aten.convolution.default):
            source = layer.args[0]
            if not is_call(source, aten.sub.Tensor) or not is_call(source.args[0], DEQUANTIZE):  # type: ignore[union-attr]
                continue
            dequantized, offset = source.args  # type: ignore[union-attr]
            if not isinstance(offset, float):
                continue
            assert isinstance(dequantized, Node)
            if reason := self._moved(gm, layer, dequantized, offset, padded):
                self.decline(reason, layer)
            else:
                self.fire()

    def _moved(
        self, gm: GraphModule, layer: Node, dequantized: Node, offset: float, padded: dict[Any, Node]
    ) -> str | None:
        """Move one; why not, or None."""
        if _is_transposed(layer):
            return _EDGES
        padding = _padding(layer)
        if any(padding) and _unshifted(dequantized) is None:
            return "the convolution pads codes with a zero point that no quantizer of this graph makes"
        sums, bias = _sums(gm, layer.args[1]), argument(layer, "bias")
        if sums is None or (bias is not None and not is_constant_expression(bias)):
            return _INPUT
        correction = -offset * sums
        if isinstance(bias, Node):
            correction += evaluate_constant(gm, bias).double()
        name = str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else name_in_module(layer, "bias")
        corrected = torch.nn.Parameter(correction.to(val(layer).dtype), requires_grad=False)
        fresh = add_constant(gm, name, corrected, layer)
        if any(padding):
            key = (dequantized, padding)
            if key not in padded:
                padded[key] = _padded(dequantized, padding, Emitter(layer))
            dequantized = padded[key]
            layer.update_arg(4, [0] * len(layer.args[4]))  # type: ignore[arg-type]
        layer.args = (dequantized, layer.args[1], fresh, *layer.args[3:])
        return None


def _is_transposed(layer: Node) -> bool:
    return is_call(layer, aten.convolution.default) and bool(argument(layer, "transposed"))


def _padding(layer: Node) -> tuple[int, ...]:
    return tuple(argument(layer, "padding")) if is_call(layer, aten.convolution.default) else ()


def _unshifted(dequantized: Node) -> Node | None:
    """`x` of `dequantize(quantize(add(x, offset), s), s)`; None for codes of something else."""
    codes = dequantized.args[0]
    shifted = codes.args[0] if isinstance(codes, Node) and is_call(codes, QUANTIZE) else None
    if not isinstance(shifted, Node) or not is_call(shifted, aten.add.Tensor) or isinstance(shifted.args[1], Node):
        return None
    assert isinstance(shifted.args[0], Node)
    return shifted.args[0]


def _padded(dequantized: Node, padding: tuple[int, ...], emit: Emitter) -> Node:
    """The codes of `dequantized` with those of zero around them."""
    quantize = dequantized.args[0]
    assert isinstance(quantize, Node)
    shifted, scale = quantize.args
    assert isinstance(shifted, Node)
    sides = [size for size in reversed(padding) for _ in range(2)]
    inner = emit(aten.constant_pad_nd.default, shifted.args[0], sides)
    codes = emit(QUANTIZE, emit(aten.add.Tensor, inner, shifted.args[1]), scale, **quantize.kwargs)
    return emit(DEQUANTIZE, codes, dequantized.args[1], **dequantized.kwargs)


def _sums(gm: GraphModule, weight: object) -> torch.Tensor | None:
    """The sum of each channel of the weight as it is dequantized, `[N]` float64; None if it is not a constant."""
    if not isinstance(weight, Node):
        return None
    if is_constant_expression(weight):
        return evaluate_constant(gm, weight).double().flatten(1).sum(-1)
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
        sums.append(dequantize(codes, own, format=fmt.name, dtype=torch.float64).flatten(1).sum(-1))
    return torch.cat(sums)
