"""Reading linear layers in blocks of FP8: 1 x 128 of the input, 128 x 128 of the weight."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.constants import evaluate_constant, is_constant_expression
from passes.formats import FP8_1X128, FP8_128X128
from passes.graph import aten, is_call, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.pairs import measured_by


def measured_blocks(node: object) -> Node | None:
    """The dynamic quantize in blocks of 1 x 128 that `node` is the dequantize of; None if it is anything else."""
    dynamic = measured_by(node)
    return dynamic if dynamic is not None and dynamic.kwargs["format"] == FP8_1X128.name else None


def block_weight(node: Node) -> Node | None:
    """The dequantize of the weight of linear layer (or experts) `node`, if that is constant codes in blocks."""
    if not is_call(node, aten.linear.default, BATCHED_LINEAR):
        return None
    weight = node.args[1]
    if not isinstance(weight, Node) or not is_call(weight, DEQUANTIZE):
        return None
    in_blocks = weight.kwargs["format"] in (FP8_128X128.name, FP8_1X128.name)
    return weight if in_blocks and all(map(is_constant_expression, weight.args)) else None


def scale_rows(gm: GraphModule, weight: Node) -> torch.Tensor:
    """Scales of a weight in blocks as `[..., N, ceil(K / 128)]`, one for each row of a block; float32."""
    assert isinstance(weight.args[1], Node)
    scale = evaluate_constant(gm, weight.args[1])
    if weight.kwargs["format"] == FP8_1X128.name:
        return scale.float()
    return scale.float().repeat_interleave(FP8_128X128.sizes[0], -2).narrow(-2, 0, int(shape(weight)[-2]))
