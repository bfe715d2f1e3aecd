"""`com.microsoft::MatMulNBits`, a product with a packed weight in blocks, becomes DQ and MatMul.

    before:  x, packed [N, blocks, bytes] (uint8), scales [N * blocks]  -> MatMulNBits -> y
    after:   codes [N, K] (int4 or int8), scales [N, blocks]            -> DQ -> Transpose -> MatMul (x, .) -> y

Two codes of 4 bits lie in a byte, the lower one first, and stand for `code - zero point`, of 8 or 128 where none is
stored. *Declines*: other widths than 4 and 8, reordered columns (g_idx), zero points in floating point.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.legacy import DEQUANTIZE, MICROSOFT, describe
from qcompile.onnx.repair.state import State, insert

_G_IDX, _BIAS = 4, 5


def is_nbits(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether `node` is the operator."""
    return node.op_type == "MatMulNBits" and node.domain == MICROSOFT


def expand_nbits(state: State) -> None:
    """*Ensures*: see above."""
    for node in state.nodes():
        if is_nbits(node):
            _expand(state, node)


def _expand(state: State, node: ir.Node) -> None:
    bits, size, rows, columns = _sizes(node)
    packed, scales = state.constant(node.inputs[1]), state.constant(node.inputs[2])
    stored = node.inputs[3] if len(node.inputs) > 3 else None
    points = state.constant(stored) if stored is not None else None
    reordered = len(node.inputs) > _G_IDX and node.inputs[_G_IDX] is not None
    unread = stored is not None and (points is None or points.dtype != np.uint8)
    if bits not in (4, 8) or reordered or unread or packed is None or scales is None:
        return
    assert node.inputs[1] is not None and node.inputs[2] is not None
    _check(node, packed, scales, points)
    state.changes.standardized[f"{MICROSOFT}::MatMulNBits"] += 1
    blocks = -(-columns // size)
    dtype: Any = ml_dtypes.uint4 if bits == 4 else np.uint8
    zero = np.full((rows, blocks), 1 << (bits - 1)) if points is None else _unpacked(points.reshape(rows, -1), bits)
    zeros = state.initializer(f"{node.name}_zero_point", zero[:, :blocks].astype(dtype))
    name = str(node.inputs[1].name)
    evaluate = state.evaluator(node.inputs[1])

    def codes() -> Array:
        return _unpacked(evaluate().reshape(rows, -1), bits)[:, :columns].astype(dtype)

    weight = state.lazy_weight(f"{name}_codes", (rows, columns), codes, ir.DataType.from_numpy(np.dtype(dtype)))
    scale = state.initializer(f"{node.inputs[2].name}_blocks", scales.reshape(rows, blocks))
    made = insert(node, DEQUANTIZE, [weight, scale, zeros], state, axis=1, block_size=size)
    made = insert(node, "Transpose", [made], state, perm=[1, 0])
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    operands = [node.inputs[0], made]
    op_type = "MatMul"
    if bias is not None:
        op_type, operands = "Add", [insert(node, "MatMul", operands, state), bias]
    node.op_type, node.domain = op_type, ""
    node.attributes.clear()
    node.resize_inputs(2)
    for index, value in enumerate(operands):
        node.replace_input_with(index, value)


def _sizes(node: ir.Node) -> tuple[int, int, int, int]:
    names = ("bits", "block_size", "N", "K")
    stated = [node.attributes[name].as_int() for name in names if name in node.attributes]
    if len(stated) < len(names) or min(stated) < 1 or len(node.inputs) < 3:
        raise RepairError(f"{describe(node)} does not say what its codes are: it needs B, scales, {', '.join(names)}")
    bits, size, rows, columns = stated
    return bits, size, rows, columns


def _check(node: ir.Node, packed: Array, scales: Array, points: Array | None) -> None:
    bits, size, rows, columns = _sizes(node)
    blocks = -(-columns // size)
    for name, array, wanted in (
        ("codes", packed, rows * blocks * (size * bits // 8)),
        ("scales", scales, rows * blocks),
        ("zero points", points, rows * -(-blocks * bits // 8)),
    ):
        if array is not None and array.size != wanted:
            raise RepairError(f"{describe(node)} has {array.size} {name}, not the {wanted} of its N, K and block_size")


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes [N, ...] from bytes [N, ...]."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
