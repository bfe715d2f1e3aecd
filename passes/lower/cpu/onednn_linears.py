"""Linear layers with a quantized weight that are multiplied in floating point on a CPU."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.compat import has_onednn
from passes.graph import Emitter, argument, aten, calls, dtype
from passes.ir import BATCHED_LINEAR
from passes.lower.cpu.half import multiplies_float16
from passes.lower.cpu.onednn import ONEDNN_LINEAR
from passes.lower.kernels import is_noted, note_kernel
from passes.quantize.sites import linear_name
from passes.reading import QuantizedLayer


class OneDnnLinears(Pass):
    """Give products with a dequantized weight to oneDNN, in float32.

    Before:
        y = linear(x, dequantize(codes, s), bias)
    After, float32:
        y = onednn_linear(x, dequantize(codes, s), bias)
    After, float16:
        y = half(onednn_linear(float(x), float(dequantize(codes, s)), float(bias)))

    Requires: integer products are lowered (`LinearsToIntMm`).
    Ensures: the same products, added in another order; float16 is rounded once, behind the bias. Every quantized layer
        is noted with what computes it.
    Declines when: torch was built without oneDNN. In bfloat16, and in float16 where the CPU has arithmetic for it, the
        layer stays: torch gives it to oneDNN by itself.
    Why: a weight that is dequantized at each call costs a tenth of the product, and plain Inductor in float32 calls
        MKL, which on the CPUs of AMD takes twice the time of oneDNN ([197,768] x [768,3072] on one core of an EPYC:
        11.6 ms against 4.9). A product in float16 takes ten times that where the CPU has no arithmetic for it.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            layer = QuantizedLayer.read(node)
            if layer is None or not layer.weight.is_constant or is_noted(node):
                continue
            if node.target is BATCHED_LINEAR:
                note_kernel(node, "bmm, weights dequantized before it", linear_name(node))
            elif dtype(node) == torch.bfloat16 or (dtype(node) == torch.float16 and multiplies_float16()):
                note_kernel(node, "linear, weight dequantized before it", linear_name(node))
            elif not has_onednn():
                self.decline("this build of torch has no oneDNN", node)
                note_kernel(node, "linear, weight dequantized before it", linear_name(node))
            else:
                _rewrite(node)
                self.fire()


def _rewrite(node: Node) -> None:
    emit = Emitter(node)
    operands = [argument(node, name) for name in ("input", "weight", "bias")]
    if dtype(node) != torch.float32:
        operands = [
            emit(aten._to_copy.default, operand, dtype=torch.float32) if isinstance(operand, Node) else None
            for operand in operands
        ]
    product = emit(ONEDNN_LINEAR, *operands)
    note_kernel(product, "oneDNN linear, weight dequantized before it", linear_name(node))
    result = product if dtype(node) == torch.float32 else emit(aten._to_copy.default, product, dtype=dtype(node))
    node.replace_all_uses_with(result)
