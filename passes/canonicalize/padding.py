"""What is padded between a quantizer and its convolution."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import constant
from passes.graph import Emitter, argument, aten, calls, is_call
from passes.ir import DEQUANTIZE, QUANTIZE

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
            path = _path(gm, pad.args[0])
            if path:
                layer.update_arg(0, _moved(pad, path, layer))
                self.fire()


def _keeps_zero(pad: Node) -> bool:
    """Whether `pad` adds copies of elements, or zeros."""
    if is_call(pad, aten.pad.default) and argument(pad, "mode", "constant") != "constant":
        return True
    return not argument(pad, "value")


def _path(gm: GraphModule, operand: object) -> list[Node]:
    """What quantizes `operand`, first to last: perhaps an addition, quantize, dequantize, and then a subtraction."""
    path: list[Node] = []
    for kind in (aten.sub.Tensor, DEQUANTIZE, QUANTIZE, aten.add.Tensor):
        if isinstance(operand, Node) and is_call(operand, kind):
            is_offset = kind in (aten.sub.Tensor, aten.add.Tensor)
            if is_offset and not isinstance(operand.args[1], float):
                break
            path.insert(0, operand)
            operand = operand.args[0]
        elif kind in (DEQUANTIZE, QUANTIZE):
            return []
    scales = [constant(gm, step.args[1]) for step in path if is_call(step, QUANTIZE)]
    shifted = is_call(path[0], aten.add.Tensor) == is_call(path[-1], aten.sub.Tensor)
    return path if shifted and all(scale is not None and scale.numel() == 1 for scale in scales) else []


def _moved(pad: Node, path: list[Node], layer: Node) -> Node:
    assert callable(pad.target)
    result = Emitter(layer, like=pad)(pad.target, path[0].args[0], *pad.args[1:], **pad.kwargs)
    for step in path:
        assert callable(step.target)
        made = Emitter(layer, like=step)(step.target, result, *step.args[1:], **step.kwargs)
        made.meta["custom"] = dict(step.meta.get("custom", {}))
        result = made
    return result
