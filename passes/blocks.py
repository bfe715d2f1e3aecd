"""Reading linear layers in blocks of FP8: 1 x 128 of the input, 128 x 128 of the weight."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.constants import evaluate_constant
from passes.formats import FP8_1X128, FP8_128X128
from passes.graph import shape
from passes.pairs import measured_by
from passes.reading import QuantizedLayer


def measured_blocks(node: object) -> Node | None:
    """The dynamic quantize in blocks of 1 x 128 that `node` is the dequantize of; None if it is anything else."""
    dynamic = measured_by(node)
    return dynamic if dynamic is not None and dynamic.kwargs["format"] == FP8_1X128.name else None


def block_weight(node: Node) -> Node | None:
    """The dequantize of the weight of linear layer (or experts) `node`, if that is constant codes in blocks."""
    layer = QuantizedLayer.read(node)
    if layer is None or layer.weight.format not in (FP8_128X128, FP8_1X128):
        return None
    return layer.weight.node if layer.weight.is_constant else None


def scale_rows(gm: GraphModule, weight: Node) -> torch.Tensor:
    """Scales of a weight in blocks as `[..., N, ceil(K / 128)]`, one for each row of a block; float32."""
    assert isinstance(weight.args[1], Node)
    scale = evaluate_constant(gm, weight.args[1])
    if weight.kwargs["format"] == FP8_1X128.name:
        return scale.float()
    return scale.float().repeat_interleave(FP8_128X128.sizes[0], -2).narrow(-2, 0, int(shape(weight)[-2]))
