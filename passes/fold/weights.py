"""Quantized weights are stored as codes."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import calls, constant, evaluate_constant, is_constant_expression, replace_with_constant
from passes.ir import QUANTIZE, quantize


class FoldWeights(Pass):
    """Evaluate `quantize` of a constant with a constant scale, and keep the codes.

    Before:
        w8 = quantize(view(w), scale)
        y = linear(x, dequantize(w8, scale))
    After:
        y = linear(x, dequantize(w_codes, scale))

    Requires: scales in their final dtype, as codes are made with exactly the scale that multiplies them later.
    Ensures: codes equal `round(w / scale)` in fp32 with saturation; the float weight is gone if nothing else reads it,
        and the codes take its name.
    Declines when: never.
    Why: the dequantize stays, so that back ends see a quantized weight and no float copy of it.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, QUANTIZE):
            weight, scale_node = node.args
            scale = constant(gm, scale_node)
            if scale is None or not isinstance(weight, Node) or not is_constant_expression(weight):
                continue
            codes = quantize(evaluate_constant(gm, weight), scale, format=str(node.kwargs["format"]))
            node.update_arg(1, None)  # so that the weight alone names the codes
            replace_with_constant(gm, node, codes)
            self.fire()
