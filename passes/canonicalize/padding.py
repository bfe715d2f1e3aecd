"""What is padded between a quantizer and its convolution."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.canonicalize.symmetric import applied_before, quantized_path
from passes.graph import argument, aten, calls, is_call

__all__ = ["PadBeforeQuantizers"]

_PADS = (aten.pad.default, aten.constant_pad_nd.default)


class PadBeforeQuantizers(Pass):
    """Pad the input of a convolution before it is quantized.

    Before:
        y = convolution(pad(dequantize(quantize(x, s), s), [1, 1, 1, 1], "reflect"), w, ...)
        z = convolution(constant_pad_nd(sub(dequantize(quantize(add(u, c), t), t), c), [0, 1, 0, 1]), v, ...)
    After:
        y = convolution(dequantize(quantize(pad(x, ...), s), s), w, ...)
        z = convolution(sub(dequantize(quantize(add(constant_pad_nd(u, ...), c), t), t), c), v, ...)

    Requires: `NormalizeConvolution` ran.
    Ensures: the same values: what is padded is elements of the tensor, or zeros, of which every quantizer makes zeros.
        Other readers keep what they read.
    Declines when: never; padding with another number, and scales that are more than one or measured, stay.
    Why: other tools quantize where a module takes its input, and padding modes, and "same" with an even kernel, pad
        inside of it. Back ends look for the quantizers at the operands.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for layer in calls(gm.graph, aten.convolution.default):
            pad = layer.args[0]
            if not is_call(pad, *_PADS) or not _keeps_zero(pad):  # type: ignore[arg-type]
                continue
            assert isinstance(pad, Node)
            path = quantized_path(gm, pad.args[0])
            if path:
                layer.update_arg(0, applied_before(pad, path, layer))
                self.fire()


def _keeps_zero(pad: Node) -> bool:
    """Whether `pad` adds copies of elements, or zeros."""
    if is_call(pad, aten.pad.default) and argument(pad, "mode", "constant") != "constant":
        return True
    return not argument(pad, "value")
