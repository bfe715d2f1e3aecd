"""Quantizing to packed FP4 in plain arithmetic."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.formats import Format, get_format
from passes.graph import Emitter, aten, calls, shape, val
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, LEAST_BLOCK_SCALE, QUANTIZE


class SpellOutFp4Codes(Pass):
    """Compute packed FP4 codes and their block scales by operators that Inductor puts into one kernel.

    Before:
        c, b = dynamic_quantize(x[...,K], g, format=nvfp4)
    After:
        blocks = reshape(float(x), [...,K/16,16])
        t = amax(abs(blocks)) / (6 g)
        b = quantize(where(t == 0, 1, maximum(t, 2^-9)), 1)
        u = blocks / unsqueeze(dequantize(b, g));  v = minimum(abs(u), 6)
        n = where(v < 2, round(2 v), where(v < 4, round(v) + 2, round(v / 2) + 4)) + where(u < 0, 8, 0)
        c = uint8(n[..., 0::2] + 16 n[..., 1::2])

    Requires: constants were folded.
    Ensures: the same bytes. Ties go to even codes: each `round` is one to even, in steps of the numbers around.
    Declines when: never.
    Why: the reference works on the bits of a float in place, which Inductor does not take as a decomposition.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DYNAMIC_QUANTIZE):
            fmt = get_format(str(node.kwargs["format"]))
            if not fmt.packed or fmt.integer:
                continue
            results = _emit(Emitter(node), node, fmt)
            for part in list(node.users):
                index = part.args[1]
                assert isinstance(index, int)
                part.replace_all_uses_with(results[index])
            self.fire()


def _emit(emit: Emitter, node: Node, fmt: Format) -> tuple[Node, Node]:
    x, global_scale = node.args
    assert isinstance(x, Node) and (global_scale is None or isinstance(global_scale, Node))
    blocks, block_scales, scale = blocks_and_scales(emit, x, global_scale, fmt)
    codes = _codes(emit, emit(aten.div.Tensor, blocks, scale), fmt)
    pairs = emit(aten.reshape.default, codes, [*emit.sizes(x)[:-1], int(shape(x)[-1]) // 2, 2])
    low, high = (emit(aten.select.int, pairs, -1, index) for index in (0, 1))
    packed = emit(aten.add.Tensor, low, emit(aten.mul.Tensor, high, 16.0))
    return emit(aten._to_copy.default, packed, dtype=fmt.storage), block_scales


def blocks_and_scales(emit: Emitter, x: Node, global_scale: Node | None, fmt: Format) -> tuple[Node, Node, Node]:
    """`x` `[...,K]` in blocks `[...,K/16,16]`, the codes of their scales `[...,K/16]`, and those scales `[...,K/16,1]`.

    All but the codes are in float32; in MXFP4, which has one level, so are these, powers of two.
    """
    values = emit(aten._to_copy.default, x, dtype=torch.float32)
    (size,) = fmt.sizes
    blocks = emit(aten.reshape.default, values, [*emit.sizes(x)[:-1], int(shape(x)[-1]) // size, size])
    amax = emit(aten.amax.default, emit(aten.abs.default, blocks), [-1])
    if fmt.scale is None:
        scale = _powers(emit, emit(aten.div.Tensor, amax, fmt.max))
        return blocks, scale, emit(aten.unsqueeze.default, scale, -1)
    scale = emit(aten.div.Tensor, amax, emit(aten.mul.Tensor, global_scale, fmt.max))
    least = emit(aten.clamp_min.default, scale, LEAST_BLOCK_SCALE)
    scale = emit(aten.where.ScalarSelf, emit(aten.eq.Scalar, scale, 0), 1.0, least)
    one = emit(aten.ones.default, [], dtype=torch.float32, device=val(x).device)
    codes = emit(QUANTIZE, scale, one, format=fmt.scale.name)
    scale = emit(DEQUANTIZE, codes, global_scale, format=fmt.scale.name, dtype=torch.float32)
    return blocks, codes, emit(aten.unsqueeze.default, scale, -1)


def _powers(emit: Emitter, scale: Node) -> Node:
    """`passes.ir.powers_above`, 1 for nothing."""
    tiny = emit(aten.lt.Scalar, scale, torch.finfo(torch.float32).tiny)
    bits = emit(aten.view.dtype, emit(aten.where.ScalarSelf, tiny, 1.0, scale), torch.int32)
    above = emit(aten.bitwise_and.Scalar, emit(aten.add.Tensor, bits, 0x7FFFFF), 0x7F800000)
    return emit(aten.view.dtype, above, torch.float32)


def _codes(emit: Emitter, x: Node, fmt: Format) -> Node:
    """fp32 -> the number of the nearest code, in fp32."""
    size = emit(aten.clamp_max.default, emit(aten.abs.default, x), fmt.max)
    result = None
    for limit, steps, first in ((None, 0.5, 4.0), (4, 1.0, 2.0), (2, 2.0, 0.0)):
        count = emit(aten.round.default, emit(aten.mul.Tensor, size, steps))
        code = emit(aten.add.Tensor, count, first)
        result = code if limit is None else emit(aten.where.self, emit(aten.lt.Scalar, size, limit), code, result)
    assert result is not None
    sign = emit(aten.where.ScalarSelf, emit(aten.lt.Scalar, x, 0), 8.0, emit(aten.zeros_like.default, x))
    return emit(aten.add.Tensor, result, sign)
