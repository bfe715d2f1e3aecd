"""Linear layers whose codes no kernel of the device multiplies run in the model's own precision."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.capabilities import converts, multiplies
from passes.constants import add_constant, evaluate_constant, root_constants
from passes.formats import Format
from passes.graph import aten, calls, dtype
from passes.ir import BATCHED_LINEAR, dequantize
from passes.lower.device import Device
from passes.lower.kernels import is_noted, note_kernel
from passes.lower.operands import constants_read, forget_unread
from passes.reading import Operand, QuantizedLayer


class LinearsInHalfPrecision(Pass):
    """Give linear layers that were not lowered the form that costs least.

    Before:
        y = linear(dequantize(quantize(x)), dequantize(w_codes, t), bias)
        z = linear(u, dequantize(v_codes, s), bias)                     # only the weight is quantized
    After:
        y = linear(dequantize(quantize(x)), w, bias)                    # the shape of this layer does not fit
        y = linear(x, w, bias)                                          # the device has no kernel for the format
        z = linear(u, dequantize(v_codes, s), bias)                     # as it was, if the device reads the codes

    Requires: the other lowerings of linear layers ran, and have declined these.
    Ensures: `w` is a constant, exactly the dequantized codes. The result is that of the quantized program, but where
        the device has no kernel for the format of the input at all: there the input is not quantized, which
        `passes.lower.kernels` says of the layer.
    Declines when: never.
    Why: to dequantize a weight in each call writes and reads it once more, which costs more than reading it in half
        precision, unless the product does it while it reads; Inductor's does with `max_autotune` (or, for one row,
        with coordinate descent tuning), so a program in which only weights are quantized, for their memory, keeps them.
        Where a whole format has no kernel (FP8 before 8.9, where Triton cannot even convert it; NVFP4 before 10.0),
        Q/DQ of the input would be pure cost, and what is left is the plain model.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def rewrite(self, gm: GraphModule) -> None:
        before, fired = constants_read(gm), self.log.fired[self.name]
        stored: dict[Node, Node] = {}
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            layer = QuantizedLayer.read(node)
            if layer is None or not layer.weight.is_constant or is_noted(node):
                continue
            name, precision = layer.name, str(layer.dtype).removeprefix("torch.")
            if (layer.input is None or layer.input.source is None) and can_convert(self.device, layer.weight.format):
                note_kernel(node, f"mm in {precision} of the weight dequantized in each call", name)
                continue
            weight = layer.weight.node
            if weight not in stored:
                stored[weight] = store_dequantized(gm, layer.weight)
            node.update_arg(1, stored[weight])
            note_kernel(node, f"mm in {precision}", name, self._drop(node, layer.input))
            self.fire()
        if self.log.fired[self.name] > fired:
            forget_unread(gm, before)

    def _drop(self, node: Node, x: Operand | None) -> str:
        """Take Q/DQ off the input of `node` if the device has no kernel for its format; what was dropped."""
        source = None if x is None else x.source
        if x is None or source is None or dtype(source) != dtype(node) or has_kernel(self.device, x.format):
            return ""
        node.update_arg(0, source)
        return f"the input is not quantized: the device has no {x.format.name}"


def has_kernel(device: Device, fmt: Format) -> bool:
    """Whether some matrix product of `device` takes codes of `fmt`."""
    return multiplies(device.capability, fmt)


def can_convert(device: Device, fmt: Format) -> bool:
    """Whether Triton converts codes or scales of `fmt` on `device`."""
    return converts(device.capability, fmt)


def store_dequantized(gm: GraphModule, weight: Operand) -> Node:
    """What `weight` dequantizes to, as a constant."""
    name = str(root_constants(weight.codes)[0].target)
    return add_constant(gm, f"{name}_dequantized", _dequantized(gm, weight.node), weight.node)


def _dequantized(gm: GraphModule, node: Node) -> torch.Tensor:
    """The value of a dequantize of constants, or of a constant."""
    operand = Operand.read(node)
    if operand is None:
        return evaluate_constant(gm, node)
    codes, scale = evaluate_constant(gm, operand.codes), _dequantized(gm, operand.scale)
    return dequantize(codes, scale, format=operand.format.name, dtype=dtype(node))
