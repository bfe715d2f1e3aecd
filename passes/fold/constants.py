"""Rearranged constants are stored the way they are used."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.constants import evaluate_constant, is_constant_expression, replace_with_constant
from passes.graph import is_call
from passes.ir import QUANTIZE


class FoldConstants(Pass):
    """Evaluate layout operators and casts of constants.

    Before:
        y = matmul(x, dequantize(transpose(w_codes, 0, 1), s))
    After:
        y = matmul(x, dequantize(w_codes_t, s))

    Requires: weights as `get_attr`.
    Ensures: bit-equal values; a quantization operator is not evaluated (`FoldWeights` makes codes, and nothing ever
        multiplies them back into floats).
    Declines when: never.
    Why: TensorRT refuses a Transpose between a quantized constant and its dequantize, and a Cast or Transpose of a
        weight at run time is work for nothing.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not is_constant_expression(node):
                continue
            if all(is_constant_expression(user) or is_call(user, QUANTIZE) for user in node.users):
                continue
            replace_with_constant(gm, node, evaluate_constant(gm, node).contiguous())
            self.fire()
