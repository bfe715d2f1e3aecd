"""What both rewrites of activations in blocks of 1 x 128 share: blocks divided by their amax, quantized by a constant.

The constant is a power of two, which every dtype holds exactly, so codes are those of `dynamic_quantize`: the largest
magnitude of a block is `FP8.max * UNIT` = 1.75. Products of 128 such numbers stay below 400, which float16 holds.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, evaluate_constant, is_constant_expression
from passes.formats import FP8, FP8_1X128, FP8_128X128
from passes.graph import Emitter, aten, dtype, is_call, name_in_module, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE

BLOCK = FP8_1X128.sizes[0]
UNIT = 2.0**-8
_LEAST_AMAX = 2.0**-100  # what a block of zeros is divided by


def measured_blocks(node: object) -> Node | None:
    """The dynamic quantize in blocks of 1 x 128 that `node` is the dequantize of; None if it is anything else."""
    if not isinstance(node, Node) or not is_call(node, DEQUANTIZE) or node.kwargs["format"] != FP8_1X128.name:
        return None
    codes = node.args[0]
    if not isinstance(codes, Node) or not is_call(codes, operator.getitem):
        return None
    return codes.all_input_nodes[0] if is_call(codes.args[0], DYNAMIC_QUANTIZE) else None


def block_weight(node: Node) -> Node | None:
    """The dequantize of the weight of linear layer (or experts) `node`, if that is constant codes in blocks."""
    if not is_call(node, aten.linear.default, BATCHED_LINEAR):
        return None
    weight = node.args[1]
    if not isinstance(weight, Node) or not is_call(weight, DEQUANTIZE):
        return None
    in_blocks = weight.kwargs["format"] in (FP8_128X128.name, FP8_1X128.name)
    return weight if in_blocks and all(map(is_constant_expression, weight.args)) else None


def product_dtype(compute: torch.dtype) -> torch.dtype:
    """What blocks are multiplied in: float16 in a bfloat16 graph, too, as it has more digits and enough range here."""
    return torch.float32 if compute == torch.float32 else torch.float16


def unit_blocks(gm: GraphModule, dynamic: Node) -> tuple[Node, Node]:
    """Codes of a dynamic quantize of `[..., K]` by a constant scale, dequantized, and what multiplies them.

    Returns:
        Values `[..., ceil(K / 128), 128]` in `product_dtype`, at most 1.75 in magnitude and exact; float32
        `[..., ceil(K / 128), 1]`, amax / 1.75 of each block.
    """
    x = dynamic.args[0]
    assert isinstance(x, Node)
    emit, to = Emitter(dynamic), product_dtype(dtype(x))
    width = int(shape(x)[-1])
    lead = emit.sizes(x)[:-1]
    if missing := -width % BLOCK:
        x = emit(aten.constant_pad_nd.default, x, [0, missing])
    blocks = emit(aten.reshape.default, x, [*lead, (width + missing) // BLOCK, BLOCK])
    if dtype(x) != torch.float32:
        blocks = emit(aten._to_copy.default, blocks, dtype=torch.float32)
    amax = emit(aten.amax.default, emit(aten.abs.default, blocks), [-1], True)
    # amax / 448 * 2^8, rounded as amax / 448 is: a factor of 4 / 7 would round ties of half-precision tensors otherwise
    size = emit(aten.div.Tensor, emit(aten.clamp_min.default, amax, _LEAST_AMAX), FP8.max * UNIT)
    wide = add_constant(gm, name_in_module(dynamic, "input_unit_float32"), torch.tensor(UNIT), dynamic)
    unit = add_constant(gm, name_in_module(dynamic, "input_unit"), torch.tensor(UNIT, dtype=to), dynamic)
    codes = emit(QUANTIZE, emit(aten.div.Tensor, blocks, size), wide, format=FP8.name)
    return emit(DEQUANTIZE, codes, unit, format=FP8.name, dtype=to), size


def scale_rows(gm: GraphModule, weight: Node) -> torch.Tensor:
    """Scales of a weight in blocks as `[..., N, ceil(K / 128)]`, one for each row of a block; float32."""
    assert isinstance(weight.args[1], Node)
    scale = evaluate_constant(gm, weight.args[1])
    if weight.kwargs["format"] == FP8_1X128.name:
        return scale.float()
    return scale.float().repeat_interleave(FP8_128X128.sizes[0], -2).narrow(-2, 0, int(shape(weight)[-2]))
