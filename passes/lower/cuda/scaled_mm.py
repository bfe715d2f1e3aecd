"""FP8 linear layers with a scale for the tensor or for each row become scaled matrix products."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.capabilities import UNITS, inputs_of
from passes.constants import add_constant
from passes.formats import FP8
from passes.graph import Emitter, aten, dtype, name_in_module, val
from passes.lower.device import Device
from passes.lower.linears import LinearLowering
from passes.lower.operands import constant_like, misaligned
from passes.lower.rows import add_bias, as_rows, like_input
from passes.lower.scales import float32_scale, in_columns, is_one_scale, scale_product, unscalable
from passes.reading import QuantizedLayer

SCALED_MM = aten._scaled_mm.default


class LinearsToScaledMm(LinearLowering):
    """Multiply FP8 codes, and let the product apply the scales.

    Before:
        y = linear(dequantize(q, s), dequantize(w_codes, t), bias)      # q = quantize(x, s) or of dynamic_quantize(x)
    After:
        y = reshape(_scaled_mm(reshape(q, [M,K]), t(w_codes), s, t, bias, None, dtype, True), [...,N])
        # a scale for each row of x or of w: s is [M,1] and t a new constant [1,N]; the one that is a number, expanded
        # where the device has that not in `dtype`: z = _scaled_mm(q, t(w_codes), 1, 1, dtype=float32); y = z * s * t

    Requires: weights as codes. The device is the one that the graph will run on.
    Ensures: the same codes; the products are added in float32 (on Hopper with `fast_accumulation`, in fewer digits
        between two roundings) and are scaled before they are rounded to the dtype. The quantize of x stays as it is,
        and so does the dequantize for its other users.
    Declines when: the device has no FP8 matrix units; K or N is no multiple of 16; a scale runs along K.
    Why: `_scaled_mm` and not `_scaled_mm_v2`, which `torch.nn.functional.scaled_mm` calls: both reach the same kernels,
        but Inductor 2.11 tunes only the first, and 2.13 hands the second on to the first. Scales for rows come in
        cuBLAS with float16 and float32 results on Hopper only, and elsewhere from CUTLASS with bfloat16 (float16 from
        10.0 on).
    """

    def __init__(self, device: Device, *, fast_accumulation: bool = True) -> None:
        super().__init__(device)
        self.fast = fast_accumulation

    def takes(self, linear: QuantizedLayer) -> bool:
        return linear.weight.format == FP8 and linear.x.format in inputs_of(FP8)

    def reason(self, linear: QuantizedLayer) -> str | None:
        return fp8_reason(self.device, linear) or misaligned(linear, 16, 16)

    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        emit = Emitter(linear.node)
        rows = as_rows(emit, linear.x.codes)
        product = scaled_after if needs_scales_after(self.device, linear) else fp8_product
        result, kernel = product(gm, emit, linear, rows, linear.weight.codes, linear.bias, fast=self.fast)
        return like_input(emit, result, linear.x.codes), kernel


def fp8_reason(device: Device, linear: QuantizedLayer) -> str | None:
    """Why FP8 codes with the scales of `linear` cannot be multiplied on `device`, or None."""
    if not UNITS["fp8"].on(device.capability):
        return f"{device} has no FP8 matrix units"
    return unscalable(linear)


def fp8_product(
    gm: GraphModule, emit: Emitter, linear: QuantizedLayer, rows: Node, weight: Node, bias: Node | None, *, fast: bool
) -> tuple[Node, str]:
    """Codes `rows` `[M,K]` times those of `weight` `[N,K]`, with the scales of `linear` and `bias` `[N]`.

    Returns `[M,N]` and the kernel's name.
    """
    codes, scale = emit(aten.t.default, weight), float32_scale(gm, emit, linear.x.scale)
    to = linear.dtype
    inside = bias if bias is not None and dtype(bias) == to != torch.float32 else None
    outside = None if inside is not None else bias
    if is_one_scale(linear.x.scale) and is_one_scale(linear.weight.scale):
        weight_scale = float32_scale(gm, emit, linear.weight.scale)
        product = emit(SCALED_MM, rows, codes, scale, weight_scale, inside, None, to, fast)
        return add_bias(emit, product, outside, to), "scaled_mm, one scale"
    weight_scale = constant_like(gm, linear.node, linear.weight.scale, in_columns(linear))
    if is_one_scale(linear.x.scale):
        count, *_ = emit.sizes(rows)
        scale = emit(aten.expand.default, emit(aten.reshape.default, scale, [1, 1]), [count, 1])
        scale = emit(aten.clone.default, scale, memory_format=torch.contiguous_format)  # the product wants strides
    else:
        scale = emit(aten.reshape.default, scale, [-1, 1])
    product = emit(SCALED_MM, rows, codes, scale, weight_scale, inside, None, to, fast)
    return add_bias(emit, product, outside, to), "scaled_mm, scales of rows"


def scaled_after(
    gm: GraphModule, emit: Emitter, linear: QuantizedLayer, rows: Node, weight: Node, bias: Node | None, *, fast: bool
) -> tuple[Node, str]:
    """`fp8_product` for devices that have no product with scales for rows in the dtype of `linear`."""
    codes, scale = emit(aten.t.default, weight), float32_scale(gm, emit, linear.x.scale)
    unit = add_constant(
        gm, name_in_module(linear.node, "unit_scale"), torch.ones((), device=val(codes).device), linear.node
    )
    product = emit(SCALED_MM, rows, codes, unit, unit, None, None, torch.float32, fast)
    product = scale_product(gm, emit, linear, product, scale)
    return add_bias(emit, product, bias, linear.dtype), "scaled_mm, scales of rows after it"


def needs_scales_after(device: Device, linear: QuantizedLayer) -> bool:
    """Whether `linear` has scales for rows, and `device` no product with those in its dtype."""
    in_one = is_one_scale(linear.x.scale) and is_one_scale(linear.weight.scale)
    return not in_one and not _has_row_scales(device, linear.dtype)


def _has_row_scales(device: Device, to: torch.dtype) -> bool:
    return device.is_hopper or to == torch.bfloat16 or (to == torch.float16 and device.has((10, 0)))
