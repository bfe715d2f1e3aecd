"""Quantized linear layers become a plain matrix product with the weight stored the way round that it needs."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.blocks import scale_rows
from passes.constants import (
    add_constant,
    constant,
    evaluate_constant,
    is_constant_expression,
    replace_with_constant,
)
from passes.formats import FP8_1X128, FP8_128X128, INT4_COLUMNS, INT4_GROUPS, get_format
from passes.graph import Emitter, aten, calls, is_call, val
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.nibbles import decode_int4
from passes.place.low_rank import is_low_rank


class StoreWeightsTransposed(Pass):
    """Write a linear layer with a quantized weight as `matmul` with the codes stored `[K, N]` (experts `[E, K, N]`).

    Before:
        y = linear(x, dequantize(codes[N,K], s), bias)
    After:
        y = add(matmul(x, dequantize(transpose(codes)[K,N], s)), bias)
        y = add(matmul(x, transpose(dequantize(codes[N,K/2], s))), bias)    # blocks along K, two codes a byte
        y = add(matmul(x, transpose(dequantize(codes[N,K], rows(s)))), bias)    # FP8 in blocks, rows(s)[N,K/128]
        y = add(matmul(x, dequantize(transpose(codes)[K,N], transpose(s)[K/32,N])), bias)   # INT4, int8 codes
        y = add(mul(matmul(x, dequantize(codes[E,K,N], max(s))), s / max(s)), bias)     # experts, s[E,N,1] or [E,1,1]
        z = mul(matmul(x, transpose(dequantize(codes, dequantize(b, max(g))))), g / max(g))     # two levels, g[E,1,1]
        y = add(matmul(x, transpose(w[E,N,K])), bias)                       # experts that are not quantized
        y = add(matmul(x, transpose(w[N,K])), bias)                         # factors of low-rank parts

    Requires: `FoldWeights` ran; `FoldConstants` follows and stores the transposed codes.
    Ensures: the same product and scale, with the bias added after it; of experts with a scale each, or one per channel,
        the product within the rounding of one more multiplication.
    Declines when: never; a weight that is not quantized stays in its linear layer, which ONNX has for all but experts,
        and which would lose the names that factors of low-rank parts are known by.
    Why: ONNX MatMul wants `[K, N]`. A Transpose before DequantizeLinear is refused by TensorRT, and one behind it is a
        node that every reader has to look through. Its scales lie along one axis, and one for each expert keeps
        TensorRT from the low-precision GEMM; a Mul behind the product does not. DequantizeLinear has blocks on one axis
        only. INT4 is unpacked, multiplied and stored by one kernel of TensorRT and one of ONNX Runtime, but only in
        this layout, and only where each product has codes of its own: so each gets them.
    """

    def rewrite(self, gm: GraphModule) -> None:
        matrices: dict[Node, tuple[Node, Node | None]] = {}  # layers that share a weight (ALBERT) go on sharing it
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            weight = node.args[1]
            assert isinstance(weight, Node)
            is_quantized = is_call(weight, DEQUANTIZE) and is_constant_expression(weight.args[0])
            if is_quantized and get_format(str(weight.kwargs["format"])) in INT4_GROUPS.values():
                self._rewrite(node, _columns(gm, weight, node), None)
                self.fire()
            elif is_quantized or node.target is BATCHED_LINEAR or is_low_rank(node):
                if weight not in matrices:
                    matrices[weight] = _transposed(gm, weight, node) if is_quantized else (_plain(weight, node), None)
                self._rewrite(node, *matrices[weight])
                self.fire()

    def _rewrite(self, node: Node, matrix: Node, factor: Node | None) -> None:
        emit = Emitter(node)
        result = emit(aten.matmul.default, node.args[0], matrix)
        if factor is not None:
            result = emit(aten.mul.Tensor, result, factor)
        if len(node.args) > 2 and node.args[2] is not None:
            bias = node.args[2] if node.target is aten.linear.default else emit(aten.unsqueeze.default, node.args[2], 1)
            result = emit(aten.add.Tensor, result, bias)
        node.replace_all_uses_with(result)


def _plain(weight: Node, before: Node) -> Node:
    return Emitter(before)(aten.transpose.int, weight, -1, -2)


def _transposed(gm: GraphModule, weight: Node, before: Node) -> tuple[Node, Node | None]:
    """The dequantize `weight` of the transposed codes, or its transpose where codes share a byte along K.

    And what the product has still to be multiplied with, `[E, 1, N]`, if anything.
    """
    emit, like = Emitter(before), Emitter(before, like=weight)
    codes, scale = weight.args
    assert isinstance(codes, Node) and isinstance(scale, Node)
    fmt = get_format(str(weight.kwargs["format"]))
    if fmt is FP8_128X128:
        rows = add_constant(gm, str(scale.target), scale_rows(gm, weight), before)
        weight = like(DEQUANTIZE, codes, rows, format=FP8_1X128.name, dtype=weight.kwargs["dtype"])
    factor = None
    if is_call(scale, DEQUANTIZE) and val(scale.args[1]).ndim == 3:  # type: ignore[arg-type]
        blocks, global_scale = scale.args
        assert isinstance(global_scale, Node)
        global_scale, factor = _factored(gm, global_scale, before, val(weight).dtype)
        scale = Emitter(before, like=scale)(DEQUANTIZE, blocks, global_scale, **scale.kwargs)
        weight = like(DEQUANTIZE, codes, scale, **weight.kwargs)
    if fmt.sizes:
        return like(aten.transpose.int, weight, -1, -2), factor
    codes = emit(aten.transpose.int, codes, -1, -2)
    if val(scale).ndim == 3:
        scale, factor = _factored(gm, scale, before, val(scale).dtype)
    elif val(scale).ndim == 2:
        scale = emit(aten.transpose.int, scale, -1, -2)
    return like(DEQUANTIZE, codes, scale, **weight.kwargs), factor


def _columns(gm: GraphModule, weight: Node, linear: Node) -> Node:
    """The dequantize of INT4 codes `[..., K, N]` and scales `[..., K / group, N]` for `linear`, and nothing else.

    The last reader's codes take the name of the weight. One group is cut in two of one scale: with a single scale for
    each column TensorRT dequantizes the weight in a kernel of its own.
    """
    emit, like = Emitter(linear), Emitter(linear, like=weight)
    codes, scale = weight.args
    assert isinstance(codes, Node) and isinstance(scale, Node)
    size = get_format(str(weight.kwargs["format"])).sizes[-1]
    if val(scale).shape[-1] == 1:
        size, scale = size // 2, emit(aten.cat.default, [scale, scale], -1)
    scales = emit(aten.transpose.int, scale, -1, -2)
    turned = emit(aten.transpose.int, codes, -1, -2)
    values = decode_int4(evaluate_constant(gm, codes)).transpose(-1, -2).contiguous()
    turned.meta["val"] = turned.meta["val"].new_empty(values.shape, dtype=values.dtype)  # a byte for each from now on
    result = like(DEQUANTIZE, turned, scales, format=INT4_COLUMNS[size].name, dtype=weight.kwargs["dtype"])
    linear.update_arg(1, None)
    if not weight.users:
        weight.graph.erase_node(weight)
    replace_with_constant(gm, turned, values)
    return result


def _factored(gm: GraphModule, scale: Node, before: Node, dtype: torch.dtype) -> tuple[Node, Node]:
    """Scales `[E, N, 1]` as the largest of them, and its quotients `[E, 1, N]` in `dtype`."""
    values = constant(gm, scale)
    assert values is not None
    name, largest = str(scale.target), values.max()
    quotients = (values.float() / largest.float()).to(dtype).transpose(-1, -2).contiguous()
    return add_constant(gm, name, largest, before), add_constant(gm, f"{name}_quotients", quotients, before)
