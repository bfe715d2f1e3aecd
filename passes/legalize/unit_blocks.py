"""What both rewrites of activations in blocks of 1 x 128 share: blocks divided by their amax, quantized by a constant.

The constant is a power of two, which every dtype holds exactly, so codes are those of `dynamic_quantize`: the largest
magnitude of a block is `FP8.max * UNIT` = 1.75. Products of 128 such numbers stay below 400, which float16 holds.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant
from passes.formats import FP8, FP8_1X128
from passes.graph import Emitter, aten, dtype, name_in_module, shape
from passes.ir import DEQUANTIZE, QUANTIZE

BLOCK = FP8_1X128.sizes[0]
UNIT = 2.0**-8
_LEAST_AMAX = 2.0**-100  # what a block of zeros is divided by


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
    # a maximum: ONNX Runtime's Clip, which clamp_min is written as, would make a finite number of an infinite amax
    least = add_constant(gm, name_in_module(dynamic, "least_amax"), torch.tensor(_LEAST_AMAX), dynamic)
    size = emit(aten.div.Tensor, emit(aten.maximum.default, amax, least), FP8.max * UNIT)
    number = torch.tensor(UNIT, dtype=torch.float32)
    wide = add_constant(gm, name_in_module(dynamic, "input_unit_float32"), number, dynamic)
    unit = add_constant(gm, name_in_module(dynamic, "input_unit"), torch.tensor(UNIT, dtype=to), dynamic)
    codes = emit(QUANTIZE, emit(aten.div.Tensor, blocks, size), wide, format=FP8.name)
    return emit(DEQUANTIZE, codes, unit, format=FP8.name, dtype=to), size
