"""NVFP4 linear layers become scaled matrix products."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from passes.capabilities import UNITS
from passes.constants import add_constant, constant, evaluate_constant
from passes.formats import NVFP4
from passes.graph import Emitter, aten, dtype, shape
from passes.lower.cuda.scaled_mm import SCALED_MM
from passes.lower.linears import LinearLowering
from passes.lower.operands import constant_like, misaligned
from passes.lower.rows import add_bias, as_rows, like_input
from passes.lower.scales import float32_scale
from passes.reading import QuantizedLayer

FP4 = torch.float4_e2m1fn_x2
TILE = (128, 4)  # scales are read in tiles of so many rows and blocks along K


class Nvfp4LinearsToScaledMm(LinearLowering):
    """Multiply FP4 codes with block scales, then by the two global scales.

    Before:
        c, b = dynamic_quantize(x, g)                                   # c [...,K/2] bytes, b [...,K/16] e4m3
        y = linear(dequantize(c, dequantize(b, g)), dequantize(w, dequantize(v, h)), bias)
    After:
        z = _scaled_mm(view(reshape(c, [M,K/2]), fp4), view(w, fp4).t(), tiles(b), v_tiles, None, None, dtype)
        y = reshape(z * (g * h) + bias, [...,N])                        # in float32, rounded once

    Requires: weights as codes.
    Ensures: the same codes and scales; `v_tiles` is a new constant in the order of `SWIZZLE_32_4_4`, and the input's
        scales are brought into it by padding and one permutation of bytes. In a float16 model the product comes in
        float32, as it could be too large without the global scales.
    Declines when: the device has no FP4 matrix units; K is no multiple of 32, or N of 16; the weight is in another
        format.
    Why: `_scaled_mm_v2` would apply the global scales itself, but Inductor 2.13 refuses it with tiles of scales.
    """

    def takes(self, linear: QuantizedLayer) -> bool:
        return linear.x.format == NVFP4

    def reason(self, linear: QuantizedLayer) -> str | None:
        if not UNITS["nvfp4"].on(self.device.capability):
            return f"{self.device} has no FP4 matrix units"
        if linear.weight.format != NVFP4:
            return f"the input is in NVFP4, and the weight in {linear.weight.format.name}"
        if linear.x.global_scale is None or linear.weight.global_scale is None:
            return "the block scales are not quantized"
        return misaligned(linear, 32, 16)

    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        blocks, global_scale = linear.x.block_scales, linear.x.global_scale
        weight_blocks, weight_global = linear.weight.block_scales, linear.weight.global_scale
        assert blocks is not None and global_scale is not None
        assert weight_blocks is not None and weight_global is not None
        rows = as_rows(emit, linear.x.codes)
        codes = emit(aten.view.dtype, rows, FP4)
        weight = emit(aten.t.default, emit(aten.view.dtype, linear.weight.codes, FP4))
        weight_tiles = constant_like(gm, linear.node, weight_blocks, in_tiles)
        to = torch.float32 if linear.dtype == torch.float16 else linear.dtype
        tiles = _emit_tiles(emit, as_rows(emit, blocks))
        product = emit(SCALED_MM, codes, weight, tiles, weight_tiles, None, None, to, False)
        result = product if to == torch.float32 else emit(aten._to_copy.default, product, dtype=torch.float32)
        result = emit(aten.mul.Tensor, result, _joint_scale(gm, emit, global_scale, weight_global))
        result = add_bias(emit, result, linear.bias, linear.dtype)
        return like_input(emit, result, linear.x.codes), "scaled_mm, NVFP4"


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """`[N, K/16]` in e4m3 -> the same as bytes of tiles, padded with zeros, in one row."""
    rows, blocks = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -blocks % TILE[1], 0, -rows % TILE[0]))
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def _emit_tiles(emit: Emitter, scales: Node) -> Node:
    """`in_tiles` as operators, for `[M, K/16]`; M can be symbolic."""
    to, blocks = dtype(scales), int(shape(scales)[1])
    rows, *_ = emit.sizes(scales)
    missing = -rows % TILE[0] if isinstance(rows, int) else emit(operator.mod, emit(operator.neg, rows), TILE[0])
    values = emit(aten.view.dtype, scales, torch.uint8)
    if missing != 0 or blocks % TILE[1]:
        values = emit(aten.constant_pad_nd.default, values, [0, -blocks % TILE[1], 0, missing])
    tiles = emit(aten.reshape.default, values, [-1, 4, 32, int(shape(values)[1]) // 4, 4])
    tiles = emit(aten.permute.default, tiles, [0, 3, 2, 1, 4])
    return emit(aten.view.dtype, emit(aten.reshape.default, tiles, [-1]), to)


def _joint_scale(gm: GraphModule, emit: Emitter, ours: Node, weights: Node) -> Node:
    """Both global scales in one, a constant if both are."""
    if constant(gm, ours) is not None:
        joint = evaluate_constant(gm, ours).float() * evaluate_constant(gm, weights).float()
        return add_constant(gm, f"{weights.target}_joint", joint, emit.before)
    return emit(aten.mul.Tensor, float32_scale(gm, emit, ours), float32_scale(gm, emit, weights))
