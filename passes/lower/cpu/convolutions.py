"""Quantized convolutions on a CPU."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from passes.base import Pass
from passes.compat import cpu_has_vnni
from passes.formats import INT8
from passes.graph import Emitter, argument, aten, calls, dtype, shape
from passes.lower.cpu.onednn import ONEDNN_CONVOLUTION
from passes.lower.kernels import is_noted, note_kernel
from passes.lower.operands import constant_like, constants_read, forget_unread
from passes.lower.scales import float32_scale, is_one_scale
from passes.reading import QuantizedLayer

__all__ = ["ConvolutionsToOneDnn"]

_LONGEST = (2**31 - 1) // (255 * 128)  # products of codes, of which one is unsigned, that int32 holds
_DEQUANTIZED = "convolution, weight dequantized before it"


class ConvolutionsToOneDnn(Pass):
    """Convolve INT8 codes as integers, and scale the sums.

    Before:
        y = convolution(dequantize(q, s), dequantize(w_codes, t), bias, stride, padding, dilation, False, [0], groups)
    After:
        y = onednn_convolution(q, s, w_codes, t, bias, stride, padding, dilation, groups)

    Requires: weights as codes.
    Ensures: sums of products are exact; where the reference rounds each dequantized operand to half precision, only the
        result is. Every quantized convolution is noted with what computes it.
    Declines when: a format is not INT8; a scale is not one for the input or one for each channel; the CPU has no VNNI,
        without which oneDNN's sums saturate; it adds so many products that int32 could overflow. The weight is
        dequantized at each call then, and codes are what is in memory. Transposed ones are not looked at.
    Why: it takes a sixth of the time of one with a dequantized weight ([1,64,56,56] with [64,64,3,3] on two cores of an
        EPYC: 0.4 ms and 0.2 for the layout of the weight, against 2.4).
    """

    def rewrite(self, gm: GraphModule) -> None:
        before, fired = constants_read(gm), self.log.fired[self.name]
        for node in calls(gm.graph, aten.convolution.default):
            layer = QuantizedLayer.read(node)
            if layer is None or not layer.weight.is_constant or is_noted(node):
                continue
            reason = _unfit(layer) if layer.input is not None else ""
            if reason is None:
                _lower(gm, layer)
                self.fire()
                continue
            if reason:
                self.decline(reason, node)
            note_kernel(node, _DEQUANTIZED, layer.name)
        if self.log.fired[self.name] > fired:
            forget_unread(gm, before)


def _unfit(layer: QuantizedLayer) -> str | None:
    """Why oneDNN does not convolve the codes of `layer`, or None."""
    for fmt in (layer.x.format, layer.weight.format):
        if fmt is not INT8:
            return f"torch convolves no {fmt.name} codes on a CPU: they are dequantized before"
    if not cpu_has_vnni():
        return (
            "this CPU has no VNNI, without which sums of products of INT8 codes saturate: they are dequantized before"
        )
    scale, weight = layer.weight.scale, layer.weight.node
    if not is_one_scale(layer.x.scale) or list(shape(scale)[1:]) != [1] * (len(shape(scale)) - 1):
        return (
            "oneDNN wants one scale for the input, and one for each channel of the weight: codes are dequantized before"
        )
    if (count := shape(weight)[1:].numel()) > _LONGEST:
        return f"sums of {count} products of INT8 codes can overflow int32: they are dequantized before"
    return None


def _lower(gm: GraphModule, layer: QuantizedLayer) -> None:
    node, weight = layer.node, layer.weight
    emit, channels = Emitter(node), int(shape(weight.node)[0])
    scales = constant_like(gm, node, weight.scale, lambda scale: scale.float().flatten().expand(channels).contiguous())
    bias = layer.bias
    if bias is not None and dtype(bias) != torch.float32:
        bias = emit(aten._to_copy.default, bias, dtype=torch.float32)
    steps = [argument(node, name) for name in ("stride", "padding", "dilation", "groups")]
    result = emit(
        ONEDNN_CONVOLUTION,
        *(layer.x.codes, float32_scale(gm, emit, layer.x.scale), weight.codes, scales, bias, *steps),
    )
    note_kernel(result, "oneDNN convolution of codes", layer.name)
    if layer.dtype != torch.float32:
        result = emit(aten._to_copy.default, result, dtype=layer.dtype)
    node.replace_all_uses_with(result)
