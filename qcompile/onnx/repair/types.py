"""A Q whose scale is of another type than its input, which TensorRT's own operator took, in standard operators.

    before:  x (float16), scale (float32)           -> QuantizeLinear
    after:   x -> Cast (float32), scale (float32)   -> QuantizeLinear

*Ensures*: the same codes: the narrower of the two becomes the wider, or both float32, and no value is rounded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.repair.casts import narrow_scale
from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE, is_blocked, is_standard
from qcompile.onnx.repair.state import State, insert

_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_FLOATS = {ir.DataType.FLOAT, *_HALF}


def match_outputs(state: State) -> bool:
    """Let the DQ of a Q in half precision give that, too, where no Cast behind it does: ONNX Runtime's quantizer mixes
    both. Returns whether there was one, so that types have to be inferred again.

    *Requires*: types are inferred.
    """
    found = []
    for quantize in state.nodes():
        dtype = quantize.inputs[0].dtype if is_standard(quantize, QUANTIZE) and quantize.inputs[0] is not None else None
        if dtype not in _HALF or dtype is None or quantize in state.converted:
            continue
        for node in quantize.outputs[0].consumers():
            scale = node.inputs[1] if is_standard(node, DEQUANTIZE) else None
            casts = all(is_standard(user, "Cast") for user in node.outputs[0].consumers())
            if scale is not None and scale.dtype is ir.DataType.FLOAT and not casts:
                node.replace_input_with(1, narrow_scale(state, node, dtype))
                found.append(node)
    state.changes.types += len(found)
    return bool(found)


def match_types(state: State) -> None:
    """*Requires*: types are inferred, scales constant."""
    for node in state.nodes():
        if not is_standard(node, QUANTIZE) or is_blocked(node):
            continue
        x, value = node.inputs[0], node.inputs[1]
        scale = state.constant(value)
        if x is None or value is None or scale is None or x.dtype not in _FLOATS:
            continue
        if ir.DataType.from_numpy(scale.dtype) is x.dtype:
            continue
        state.changes.types += 1
        if scale.dtype != np.float32:  # else both become float32, which holds either exactly
            node.replace_input_with(1, state.initializer(f"{value.name}_float", scale.astype(np.float32)))
        if x.dtype is not ir.DataType.FLOAT:
            cast = insert(node, "Cast", [x], state, to=int(ir.DataType.FLOAT))
            cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
            node.replace_input_with(0, cast)
