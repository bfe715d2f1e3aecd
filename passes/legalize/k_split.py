"""Linear layers with FP8 weights in blocks of 128 x 128 and activations in blocks of 1 x 128."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.blocks import block_weight, measured_blocks, scale_rows
from passes.constants import add_constant
from passes.formats import FP8
from passes.graph import Emitter, aten, calls, dtype, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.legalize.unit_blocks import BLOCK, UNIT, product_dtype, unit_blocks

K_SPLIT = "k_split"  # key in the metadata of the products, for the report


class SplitK(Pass):
    """Multiply each block of the reduction axis on its own, and add the products times their scales.

    Before:
        c, s = dynamic_quantize(x[B,S,K], format=fp8_1x128)
        y = linear(dequantize(c, s), dequantize(w[N,K], t[N/128,K/128]), bias)
    After, with n = ceil(K / 128):
        b = reshape(pad(x), [B,S,n,128])                        # in float32 up to the quantize
        a = maximum(amax(abs(b), -1, keepdim), least) / 1.75
        p = dequantize(quantize(div(b, a), 2^-8), 2^-8)         # [B,S,n,128]
        p = transpose(reshape(p, [B*S,n,128]))                  # [n,B*S,128]
        z = matmul(p, dequantize(v[n,128,N], 2^-8))             # v: w rearranged; [n,B*S,N]
        y = add(reshape(sum(mul(z, a * t'), 0), [B,S,N]), bias) # t'[n,1,N] = t / 2^-8, in float32

    Requires: parallel layers merged; weights in their linear layers (before `StoreWeightsTransposed`);
        `FoldConstants` follows and stores the rearranged codes.
    Ensures: the same codes on both sides. Sums over a block are rounded to float16 (float32 in a float32 graph); the
        sum over blocks and the bias are added in float32. Layers that share an input share its quantizer. Experts
        `[E,N,K]` get `[E*n,M,128]` products, or `[n,M,E*N]` ones where all read the same rows.
    Declines when: never; a weight in other granularity, or an input that is not in blocks, is not looked at.
    Why: TensorRT multiplies no FP8 with scales along K, while this is an FP8 GEMM whose scales join the kernels around
        it; the price is that the product of every block is written to memory.
    """

    def rewrite(self, gm: GraphModule) -> None:
        matrices: dict[tuple[Node, bool], tuple[Node, Node]] = {}  # layers that share a weight go on sharing it
        for node in calls(gm.graph, DEQUANTIZE):
            dynamic = measured_blocks(node)
            readers = [user for user in node.users if user.args[0] is node and block_weight(user) is not None]
            if dynamic is None or not readers:
                continue
            values, size = unit_blocks(gm, dynamic)
            for linear in readers:
                weight = block_weight(linear)
                assert weight is not None
                joint = linear.target is BATCHED_LINEAR and shape(values)[0] == 1  # all experts read the same rows
                if (weight, joint) not in matrices:
                    matrices[weight, joint] = _matrix(gm, weight, joint, linear)
                _rewrite(linear, values, size, *matrices[weight, joint], joint)
                self.fire()


def _matrix(gm: GraphModule, weight: Node, joint: bool, before: Node) -> tuple[Node, Node]:
    """Codes `[n,128,N]`, dequantized by the unit, and scales `[n,1,N]` to multiply the products with.

    Of experts `[E*n,128,N]` and `[E*n,1,N]`; if `joint`, `[n,128,E*N]` and `[n,1,E*N]`.
    """
    emit = Emitter(before, like=weight)
    codes = weight.args[0]
    assert isinstance(codes, Node)
    *experts, rows, width = (int(size) for size in shape(codes))
    name = f"{codes.target}" if codes.op == "get_attr" else f"{codes.all_input_nodes[0].target}"
    if missing := -width % BLOCK:
        zeros = torch.zeros((*experts, rows, missing), dtype=dtype(codes))
        codes = emit(aten.cat.default, [codes, add_constant(gm, f"{name}_padding", zeros, before)], -1)
    scale = scale_rows(gm, weight) / UNIT
    if joint or not experts:
        rows *= experts[0] if experts else 1
        parts, order = [rows, -1, BLOCK], [1, 2, 0]
        scale = scale.reshape(rows, -1).t().unsqueeze(1)
    else:
        parts, order = [*experts, rows, -1, BLOCK], [0, 2, 3, 1]
        scale = scale.transpose(-1, -2).reshape(-1, 1, rows)
    split = emit(aten.permute.default, emit(aten.reshape.default, codes, parts), order)
    if len(order) == 4:
        split = emit(aten.reshape.default, split, [-1, BLOCK, rows])
    to = product_dtype(dtype(weight))
    unit = add_constant(gm, f"{name}_unit", torch.tensor(UNIT, dtype=to), before)
    factor = add_constant(gm, f"{name}_scale_rows", scale.contiguous(), before)
    return emit(DEQUANTIZE, split, unit, format=FP8.name, dtype=to), factor


def _rewrite(linear: Node, values: Node, size: Node, matrix: Node, scale: Node, joint: bool) -> None:
    emit, compute = Emitter(linear), dtype(linear)
    experts = linear.target is BATCHED_LINEAR
    lead, blocks = emit.sizes(linear)[:-1], int(shape(values)[-2])
    batched = experts and not joint
    values, size = (_blocks_first(emit, node, blocks, batched) for node in (values, size))
    product = emit(aten.matmul.default, values, matrix)
    product.meta[K_SPLIT] = True
    if dtype(product) != torch.float32:
        product = emit(aten._to_copy.default, product, dtype=torch.float32)
    scaled = emit(aten.mul.Tensor, product, emit(aten.mul.Tensor, size, scale))
    if batched:
        scaled = emit(aten.reshape.default, scaled, [lead[0], blocks, lead[1], shape(linear)[-1]])
    axis = 1 if batched else 0
    # TensorRT makes a kernel of a sum over one block, too
    result = emit(aten.squeeze.dim, scaled, axis) if blocks == 1 else emit(aten.sum.dim_IntList, scaled, [axis])
    if joint:  # [M, E*N]
        result = emit(aten.reshape.default, result, [lead[1], lead[0], shape(linear)[-1]])
        result = emit(aten.transpose.int, result, 0, 1)
    elif len(lead) > 1 and not experts:
        result = emit(aten.reshape.default, result, [*lead, shape(linear)[-1]])
    bias = linear.args[2] if len(linear.args) > 2 else None
    if isinstance(bias, Node):
        if compute != torch.float32:
            bias = emit(aten._to_copy.default, bias, dtype=torch.float32)
        result = emit(aten.add.Tensor, result, emit(aten.unsqueeze.default, bias, 1) if experts else bias)
    if compute != torch.float32:
        result = emit(aten._to_copy.default, result, dtype=compute)
    linear.replace_all_uses_with(result)


def _blocks_first(emit: Emitter, node: Node, blocks: int, batched: bool) -> Node:
    """`[..., n, last]` -> `[n, rows, last]`; of experts `[E, M, n, last]` -> `[E*n, M, last]`."""
    last = shape(node)[-1]
    if batched:
        moved = emit(aten.transpose.int, node, 1, 2)
        return emit(aten.reshape.default, moved, [-1, emit.sizes(moved)[2], last])
    if len(shape(node)) != 3:
        node = emit(aten.reshape.default, node, [-1, blocks, last])
    return emit(aten.transpose.int, node, 0, 1)
