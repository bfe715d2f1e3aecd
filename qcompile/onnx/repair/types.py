"""A Q whose scale is of another type than its input, which TensorRT's own operator took, in standard operators.

    before:  x (float16), scale (float32)           -> QuantizeLinear
    after:   x -> Cast (float32), scale (float32)   -> QuantizeLinear

*Ensures*: the same codes: the narrower of the two becomes the wider, or both float32, and no value is rounded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.repair.legacy import QUANTIZE
from qcompile.onnx.repair.state import State, insert

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def match_types(state: State) -> None:
    """*Requires*: types are inferred, scales constant."""
    for node in state.nodes():
        if node not in state.converted or node.op_type != QUANTIZE:
            continue
        x, value = node.inputs[0], node.inputs[1]
        scale = state.constant(value)
        assert x is not None and value is not None and scale is not None
        if x.dtype not in _FLOATS or ir.DataType.from_numpy(scale.dtype) is x.dtype:
            continue
        if scale.dtype != np.float32:  # else both become float32, which holds either exactly
            node.replace_input_with(1, state.initializer(f"{value.name}_float", scale.astype(np.float32)))
        if x.dtype is not ir.DataType.FLOAT:
            cast = insert(node, "Cast", [x], state, to=int(ir.DataType.FLOAT))
            cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
            node.replace_input_with(0, cast)
