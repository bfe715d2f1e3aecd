"""FP8 linear layers in blocks of 128 become scaled matrix products."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.blocks import scale_rows
from passes.constants import add_constant, root_constants
from passes.formats import FP8_1X128, FP8_128X128
from passes.graph import Emitter, aten
from passes.lower.cuda.scaled_mm import SCALED_MM
from passes.lower.linears import LinearLowering
from passes.lower.operands import constant_like, misaligned
from passes.lower.rows import add_bias, as_rows, first_rows, like_input, pad_rows
from passes.reading import QuantizedLayer

ROWS = 4  # scales of rows lie side by side, and each column of them starts at a multiple of 16 bytes


class BlockLinearsToScaledMm(LinearLowering):
    """Multiply FP8 codes in blocks of 1 x 128 by those of blocks of 128 x 128.

    Before:
        c, s = dynamic_quantize(x, None, format=fp8_1x128)              # s [...,K/128]
        y = linear(dequantize(c, s), dequantize(w_codes, t[N/128,K/128], format=fp8_128x128), bias)
    After:
        c, s = pad(reshape(c, [M,K])), pad(reshape(s, [M,K/128]))       # M up to a multiple of 4
        z = _scaled_mm(c, t(w_codes), t(clone(t(s))), t(t_constant), None, None, dtype)
        y = add(reshape(z[:M], [...,N]), bias)
        # blocks of 1 x 128, or N or K/128 that do not fit: a scale for each row, t_rows [K/128,N]

    Requires: weights as codes.
    Ensures: the same codes and scales. The result is rounded once, in float16 models from float32.
    Declines when: the device is not Hopper: cuBLAS has these scales there only; K is no multiple of 128, N of 16; the
        weight is not in blocks of 128.
    Why: each column of the input's scales has M numbers, which lie side by side and of which cuBLAS reads multiples of
        four; `_scaled_mm` does not pad those of 128 x 128 blocks, of which it reads multiples of four along K, so other
        weights get a scale for each row. float16 results and a bias inside are not among what torch tests.
    """

    def takes(self, linear: QuantizedLayer) -> bool:
        return linear.x.format == FP8_1X128

    def reason(self, linear: QuantizedLayer) -> str | None:
        if not self.device.is_hopper:
            return f"{self.device} has no product of FP8 in blocks of 128, which cuBLAS has on Hopper alone"
        if linear.weight.format not in (FP8_1X128, FP8_128X128):
            return f"the input is in blocks of 128, and the weight in {linear.weight.format.name}"
        return misaligned(linear, 128, 16)

    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        rows = as_rows(emit, linear.x.codes)
        codes = pad_rows(emit, rows, ROWS)
        scale = emit(aten.t.default, pad_rows(emit, as_rows(emit, linear.x.scale), ROWS))
        scale = emit(aten.t.default, emit(aten.clone.default, scale, memory_format=torch.contiguous_format))
        weight_scale, kernel = _weight_scale(gm, emit, linear)
        to = linear.dtype if linear.dtype == torch.bfloat16 else torch.float32
        weight = emit(aten.t.default, linear.weight.codes)
        product = emit(SCALED_MM, codes, weight, scale, weight_scale, None, None, to, False)
        result = add_bias(emit, first_rows(emit, product, rows), linear.bias, linear.dtype)
        return like_input(emit, result, linear.x.codes), kernel


def _weight_scale(gm: GraphModule, emit: Emitter, linear: QuantizedLayer) -> tuple[Node, str]:
    """Scales `[K/128, N/128]`, or `[K/128, N]`, in the strides that cuBLAS reads; and the kernel's name."""
    rows, columns = linear.sizes
    if linear.weight.format == FP8_128X128 and rows % 128 == 0 and columns % 512 == 0:
        blocks = linear.weight.scale
        if blocks.op != "get_attr":
            blocks = constant_like(gm, linear.node, blocks, torch.Tensor.contiguous)
        return emit(aten.t.default, blocks), "scaled_mm, blocks of 1 x 128 and 128 x 128"
    name = str(root_constants(linear.weight.scale)[0].target)
    for_rows = scale_rows(gm, linear.weight.node).t().contiguous()
    return add_constant(gm, f"{name}_rows", for_rows, linear.node), "scaled_mm, blocks of 1 x 128"
