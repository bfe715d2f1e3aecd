"""Shapes that the graph computes from what is known become constants, so that inference sees through them.

    before:  x [1, 3, 96, 96] -> Shape -> Slice -> Concat -> Reshape(y, .)     y's new shape: three unknown dims
    after:   [1, 128, -1]                                 -> Reshape(y, .)     [1, 128, 36]

What older exporters leave of `x.view(x.shape[0], ...)`. A dynamic dimension stays computed.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE
from qcompile.onnx.repair.state import State
from qcompile.onnxfile.payload import SMALL_BYTES

_SHAPE_TYPES = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def fold_shapes(state: State) -> None:
    """*Requires*: types and shapes are inferred."""
    for node in list(state.model.graph):
        if node.op_type == "Constant" or len(node.outputs) != 1:
            continue
        (output,) = node.outputs
        users = list(output.consumers())
        if output.dtype not in _SHAPE_TYPES or not users or output.is_graph_output() or not state.is_constant(output):
            continue
        size = output.shape.numpy() if output.shape is not None and output.shape.is_static() else None
        if (
            size is None
            or math.prod(size) * output.dtype.itemsize > SMALL_BYTES
            or any(user.op_type in (QUANTIZE, DEQUANTIZE) for user in users)
        ):
            continue
        array = state.constant(output)
        if array is not None:
            output.replace_all_uses_with(state.initializer(str(output.name), array))
