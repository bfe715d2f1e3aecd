"""Integer quantizers: the type of their codes, and numbers along the axis or the blocks of a scale."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE, channel_axis, is_blocked, is_standard, zero_point_of
from qcompile.onnx.repair.state import State

INTEGERS = {
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4),
    *(ir.DataType.INT16, ir.DataType.UINT16),
}
SIGNED = {ir.DataType.UINT8: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.INT4}
SHIFT = {ir.DataType.UINT8: 128, ir.DataType.UINT4: 8}
"""What is subtracted from unsigned codes to make them signed."""


def code_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes of a Q or DQ; without zero point and `output_dtype` a Q makes uint8."""
    zero = zero_point_of(node)
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    if node.op_type == DEQUANTIZE:
        return node.inputs[0].dtype if node.inputs[0] is not None else None
    stated = node.attributes.get("output_dtype")
    return ir.DataType(stated.as_int()) if stated is not None and stated.as_int() else ir.DataType.UINT8


def integer_nodes(state: State, *op_types: str) -> list[ir.Node]:
    """Standard Q and DQ (or one of the two) with codes of 4, 8 or 16 bits."""
    wanted = op_types or (QUANTIZE, DEQUANTIZE)
    return [node for node in state.nodes() if is_standard(node, *wanted) and code_type(node) in INTEGERS]


def zeros(state: State, node: ir.Node) -> Array | None:
    """The zero point as int64, 0 without one; None if it is computed."""
    value = zero_point_of(node)
    stored = state.constant(value) if value is not None else np.zeros((), np.int8)
    return None if stored is None else stored.astype(np.int64)


def along(values: Array, shape: tuple[int, ...], node: ir.Node) -> Array:
    """A scale or zero point of `node`, in a shape that broadcasts to that of its data."""
    if values.size == 1:
        return values.reshape(())
    axis = _axis(node, len(shape)) % len(shape)
    if is_blocked(node):
        size = node.attributes["block_size"].as_int()
        return np.repeat(values, min(size, shape[axis]), axis).take(range(shape[axis]), axis)
    return values.reshape(values.size, *[1] * (len(shape) - axis - 1))


def _axis(node: ir.Node, rank: int) -> int:
    """Some writers leave the default, 1, on biases of one axis."""
    return 0 if rank == 1 else channel_axis(node)


def fits(values: Array, shape: tuple[int, ...], node: ir.Node) -> bool:
    """Whether a scale or zero point of `node` has a shape that the standard allows for its data."""
    axis = _axis(node, len(shape))
    if values.size == 1 or not -len(shape) <= axis < len(shape):
        return values.size == 1
    if not is_blocked(node):
        return values.shape == (shape[axis],)
    blocks = list(shape)
    blocks[axis] = math.ceil(shape[axis] / node.attributes["block_size"].as_int())
    return values.shape == tuple(blocks)


def dequantized(state: State, node: ir.Node) -> Array | None:
    """What a DQ makes of stored codes, in float32; None if any of it is computed."""
    codes, scale, zero = state.constant(node.inputs[0]), state.constant(node.inputs[1]), zeros(state, node)
    if codes is None or scale is None or zero is None:
        return None
    if not (fits(scale, codes.shape, node) and fits(zero, codes.shape, node)):
        return None
    exact = codes.astype(np.int64) - along(zero, codes.shape, node)
    with np.errstate(over="ignore"):
        made: Array = exact.astype(np.float32) * along(scale, codes.shape, node).astype(np.float32)
    return made


def set_zero(state: State, node: ir.Node, zero: Array, dtype: ir.DataType | None = None) -> None:
    """Give `node` the zero point `zero`, in the shape of its scale; of type `dtype`, or of that of its codes.

    It is one of its own: two weights that share theirs do not load in ONNX Runtime with `session.x64quantprecision`.
    """
    scale, dtype = state.constant(node.inputs[1]), dtype or code_type(node)
    assert scale is not None and dtype is not None
    name = state.name(f"{node.outputs[0].name}_zero_point")
    made = np.broadcast_to(zero, scale.shape).astype(dtype.numpy())
    node.resize_inputs(3)
    node.replace_input_with(2, state.weight(ir.tensor(made, name=name), name))
    if node.op_type == QUANTIZE:
        node.attributes.pop("output_dtype", None)
