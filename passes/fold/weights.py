"""Quantized weights are stored as codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import ConstantRows, add_constant, constant, is_constant_expression, replace_with_constant
from passes.formats import get_format
from passes.graph import calls
from passes.ir import DYNAMIC_QUANTIZE, QUANTIZE, dynamic_quantize, quantize


class FoldWeights(Pass):
    """Evaluate the quantize of a constant, and keep the codes.

    Before:
        w8 = quantize(view(w), scale)
        y = linear(x, dequantize(w8, scale))
        c, b = dynamic_quantize(v, g)           # two levels: NVFP4
        z = linear(x, dequantize(c, dequantize(b, g)))
    After:
        y = linear(x, dequantize(w_codes, scale))
        z = linear(x, dequantize(v_codes, dequantize(v_block_scales, g)))

    Requires: scales in their final dtype, as codes are made with exactly the scale that multiplies them later.
    Ensures: codes equal `round(w / scale)` in fp32 with saturation; the float weight is gone if nothing else reads it,
        and the codes take its name.
    Declines when: never.
    Why: the dequantize stays, so that back ends see a quantized weight and no float copy of it.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE):
            weight, scale_node = node.args
            scale = constant(gm, scale_node)
            if scale is None or not isinstance(weight, Node) or not is_constant_expression(weight):
                continue
            if node.target is QUANTIZE:
                self._fold(gm, node, scale)
            else:
                self._fold_blocks(gm, node, scale)
            self.fire()

    def _fold(self, gm: GraphModule, node: Node, scale: torch.Tensor) -> None:
        """One level: a scale for the tensor or for each channel."""
        format, weight = str(node.kwargs["format"]), node.args[0]
        assert isinstance(weight, Node)
        constant_rows = ConstantRows(gm, weight)
        codes = torch.empty(constant_rows.shape, dtype=get_format(format).storage)
        for rows, values in constant_rows:
            own = scale[rows] if scale.ndim and scale.shape[0] > 1 else scale
            codes[rows] = quantize(values, own, format=format)
        node.update_arg(1, None)  # so that the weight alone names the codes
        replace_with_constant(gm, node, codes)

    def _fold_blocks(self, gm: GraphModule, node: Node, global_scale: torch.Tensor) -> None:
        """Two levels: scales of blocks, stored beside the codes, under the global one."""
        format, weight = str(node.kwargs["format"]), node.args[0]
        assert isinstance(weight, Node)
        codes, scales = (torch.empty(value.shape, dtype=value.dtype) for value in node.meta["val"])
        for rows, values in ConstantRows(gm, weight):
            codes[rows], scales[rows] = dynamic_quantize(values, global_scale, format=format)
        name = str(node.args[1].target).replace("global_scale", "block_scale")  # type: ignore[union-attr]
        node.update_arg(1, None)
        for part in list(node.users):
            is_codes = part.args[1] == 0
            stored = node if is_codes else add_constant(gm, name, torch.nn.Parameter(scales, requires_grad=False), part)
            part.replace_all_uses_with(stored)
            gm.graph.erase_node(part)
        replace_with_constant(gm, node, codes)
