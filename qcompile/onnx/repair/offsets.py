"""Integer zero points of activations, which TensorRT refuses, become additions in front of Q, subtractions behind DQ.

    before:  x          -> Q (zero point z) -> codes -> DQ (zero point z) -> y
    after:   x + s z    -> Q                -> codes -> DQ -> Sub s z     -> y

`clamp(round(x / s) + z)` is `clamp(round((x + s z) / s))` up to ties where z is odd. In half precision both are in
float32, so that they round no code. `products` moves the subtraction behind GEMMs.

*Requires*: codes are signed and stored right before their DQ, scales constant, types inferred.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.blocks import products_of, subtract_blocks
from qcompile.onnx.repair.integers import along, code_type, fits, integer_nodes, set_zero, zeros
from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE, describe, is_blocked
from qcompile.onnx.repair.products import Offsets, Shifted, correct, quantize_shifted, widen_scale
from qcompile.onnx.repair.state import State, follow, insert, take_over

_FLOAT = ir.DataType.FLOAT
_BITS = (ir.DataType.INT8, ir.DataType.INT4)


def move_zero_points(state: State) -> None:
    """*Ensures*: no Q or DQ of INT8 or INT4 codes has a zero point other than 0, or it is computed."""
    offsets: Offsets = {}
    for node in integer_nodes(state):
        offset = _offset(state, node) if code_type(node) in _BITS else None
        if offset is None:
            continue
        state.changes.offsets.append(describe(node))
        if is_blocked(node) and products_of(node):
            subtract_blocks(state, node)
            continue
        if node.op_type == QUANTIZE:
            set_zero(state, node, np.zeros((), np.int64))
            quantize_shifted(state, node, offset)
        else:
            raw = node.outputs[0]
            offsets[_shift_output(state, node, offset)] = Shifted(raw, offset)
    correct(state, offsets)


def _offset(state: State, node: ir.Node) -> Array | None:
    """s z as it lies along the data of `node`; None if it is 0 or computed."""
    scale, zero, x = state.constant(node.inputs[1]), zeros(state, node), node.inputs[0]
    if scale is None or zero is None or not zero.any() or x is None or (zero.size > 1 and x.shape is None):
        return None
    shape = tuple(size if isinstance(size, int) else 1 for size in x.shape) if x.shape is not None else ()
    if zero.size > 1 and not fits(zero, shape, node):
        return None
    return along((scale.astype(np.float64) * zero).astype(np.float32), shape, node)


def _shift_output(state: State, node: ir.Node, offset: Array) -> ir.Value:
    """What takes over from the output of a DQ: less the offset, in float32."""
    set_zero(state, node, np.zeros((), np.int64))
    scale, raw = node.inputs[1], node.outputs[0]
    assert scale is not None
    constant = state.initializer(f"{node.name}_offset", offset)
    if scale.dtype is _FLOAT:
        return follow(node, "Sub", [constant], state)
    wide = insert(node, DEQUANTIZE, list(node.inputs), state, **dict(node.attributes))
    made = wide.producer()
    assert made is not None and scale.dtype is not None
    widen_scale(state, made)
    exact = insert(node, "Sub", [wide, constant], state)
    narrow = insert(node, "Cast", [exact], state, to=int(scale.dtype))
    take_over(raw, narrow, state)
    return narrow
