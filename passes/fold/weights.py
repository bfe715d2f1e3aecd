"""Quantized weights are stored as codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import constant, evaluate_constant, is_constant_expression, replace_with_constant
from passes.formats import get_format
from passes.graph import calls
from passes.ir import QUANTIZE, quantize

_CHUNK = 1 << 18  # elements


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
            codes = _quantize_rows(evaluate_constant(gm, weight), scale, str(node.kwargs["format"]))
            node.update_arg(1, None)  # so that the weight alone names the codes
            replace_with_constant(gm, node, codes)
            self.fire()


def _quantize_rows(weight: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """`quantize`, some rows at a time.

    The fp32 quotients of a whole weight are four times its codes, and among the codes that stay they leave holes that
    the allocator does not give back: 180 MB for a ViT-base.
    """
    codes = torch.empty(weight.shape, dtype=get_format(format).storage)
    step = max(1, _CHUNK * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        own = scale[rows] if scale.ndim and scale.shape[0] > 1 else scale
        codes[rows] = quantize(weight[rows], own, format=format)
    return codes
