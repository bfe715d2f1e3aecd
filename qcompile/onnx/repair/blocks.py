"""Zero points of INT4 weights in blocks: what they take from a product is subtracted behind it.

    before:  codes [K, N], scales, zero points [K / b, N] -> DQ -> MatMul (x [M, K], .)
    after:   codes [K, N], scales                         -> DQ -> MatMul (x, .) -> Sub
             x -> Reshape [M, K / b, b] -> ReduceSum -> MatMul (., scales * zero points) -^

The codes stay in 4 bits, and TensorRT unpacks them in the kernel that multiplies; with the zero points in them they
would be of 8, and dequantized by a kernel of their own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.repair.integers import set_zero, zeros
from qcompile.onnx.repair.legacy import channel_axis, is_blocked, is_standard
from qcompile.onnx.repair.state import State, follow, insert


def products_of(node: ir.Node) -> list[ir.Node]:
    """The MatMuls that multiply with the weight that `node` dequantizes, in blocks along K; none if anything else
    reads it, or K is no multiple of the block."""
    codes, transposes = node.inputs[0], channel_axis(node) % 2 == 1
    if not is_blocked(node) or codes is None or codes.shape is None or len(codes.shape) != 2:
        return []
    size, length = node.attributes["block_size"].as_int(), codes.shape.numpy()[channel_axis(node)]
    moves = list(node.outputs[0].consumers()) if transposes else []
    values = [move.outputs[0] for move in moves] if transposes else [node.outputs[0]]
    uses = [use for value in values for use in value.uses()]
    outputs = any(value.is_graph_output() for value in (node.outputs[0], *values))
    turned = all(is_standard(move, "Transpose") for move in moves)
    if outputs or not turned or length % size or not all(_is_product(*use) for use in uses):
        return []
    return [user for user, _ in uses]


def _is_product(user: ir.Node, index: int) -> bool:
    x = user.inputs[0]
    return is_standard(user, "MatMul") and index == 1 and x is not None and x.shape is not None


def subtract_blocks(state: State, node: ir.Node) -> None:
    """*Requires*: `products_of(node)`; constant scales and zero points."""
    scale, zero, size = state.constant(node.inputs[1]), zeros(state, node), node.attributes["block_size"].as_int()
    assert scale is not None and zero is not None
    table = (scale.astype(np.float64) * zero).astype(scale.dtype)
    table = table.T if channel_axis(node) % 2 == 1 else table
    axis = state.initializer("sum_axis_1", np.array([-1], np.int64))
    for product in products_of(node):
        x = product.inputs[0]
        assert x is not None and x.shape is not None
        blocks = np.array([0] * (len(x.shape) - 1) + [len(table), size], np.int64)
        value = insert(product, "Reshape", [x, state.initializer("blocks", blocks)], state)
        value = insert(product, "ReduceSum", [value, axis], state, keepdims=0)
        offsets = state.initializer(f"block_zero_points_{node.name}", np.ascontiguousarray(table))
        follow(product, "Sub", [insert(product, "MatMul", [value, offsets], state)], state)
    set_zero(state, node, np.zeros((), np.int64))
