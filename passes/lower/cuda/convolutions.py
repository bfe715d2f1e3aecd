"""Quantized convolutions on a CUDA device, in the model's own precision."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.capabilities import converts
from passes.graph import aten, calls, dtype
from passes.lower.cuda.half_linears import store_dequantized
from passes.lower.device import Device
from passes.lower.kernels import is_noted, note_kernel
from passes.lower.operands import constants_read, forget_unread
from passes.reading import QuantizedLayer

__all__ = ["ConvolutionsInHalfPrecision"]


class ConvolutionsInHalfPrecision(Pass):
    """Store the weights of quantized convolutions dequantized.

    Before:
        y = convolution(dequantize(quantize(x)), dequantize(w_codes, t), bias, ...)
    After:
        y = convolution(dequantize(quantize(x)), w, bias, ...)
        y = convolution(x, w, bias, ...)                                 # the device does not convert the format

    Requires: weights as codes.
    Ensures: `w` is a constant, exactly the dequantized codes. The result is that of the quantized program, but where
        the device cannot convert to the format of the input: there it is not quantized, which `passes.lower.kernels`
        says.
    Declines when: every time, to say why: torch convolves no codes on CUDA devices.
    Why: to dequantize a weight in each call writes and reads it once more, and cuDNN takes floating point only. Q/DQ of
        the input joins the kernel before it.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def rewrite(self, gm: GraphModule) -> None:
        before, fired = constants_read(gm), self.log.fired[self.name]
        stored: dict[Node, Node] = {}
        for node in calls(gm.graph, aten.convolution.default):
            layer = QuantizedLayer.read(node)
            if layer is None or not layer.weight.is_constant or is_noted(node):
                continue
            name, precision, weight = layer.name, str(layer.dtype).removeprefix("torch."), layer.weight.node
            self.decline(f"torch convolves no codes on a CUDA device: it runs in {precision}", node)
            if weight not in stored:
                stored[weight] = store_dequantized(gm, layer.weight)
            node.update_arg(1, stored[weight])
            note_kernel(node, f"convolution in {precision}", name, self._drop(layer))
            self.fire()
        if self.log.fired[self.name] > fired:
            forget_unread(gm, before)

    def _drop(self, layer: QuantizedLayer) -> str:
        """Take Q/DQ off the input of `layer` if the device cannot convert to its format; what was dropped."""
        source = None if layer.input is None else layer.input.source
        if source is None or dtype(source) != layer.dtype or converts(self.device.capability, layer.x.format):
            return ""
        layer.node.update_arg(0, source)
        return f"the input is not quantized: the device has no {layer.x.format.name}"
