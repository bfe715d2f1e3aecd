"""Biases in INT32 codes, as ONNX Runtime's, Quark's and AIMET's quantizers write them, become float.

    before:  codes [N] (int32), scale -> DequantizeLinear -> Gemm, Conv, Add
    after:   bias [N] (float)                             -> Gemm, Conv, Add

TensorRT's parser refuses to dequantize INT32. The codes are dequantized as the standard says, and as ONNX Runtime does:
(codes - zero point) in float32, times the scale, rounded to the type of the scale. Codes beyond 2^24 round to float32
first, and every bias once in the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.repair.legacy import DEQUANTIZE, channel_axis, is_blocked, is_standard, zero_point_of
from qcompile.onnx.repair.state import Array, State


def fold_biases(state: State) -> None:
    """*Requires*: nothing. One that is computed, or an output of the graph, or in blocks, stays as it is."""
    for node in state.nodes():
        codes = state.constant(node.inputs[0]) if _is_int32(node) else None
        scale = state.constant(node.inputs[1]) if codes is not None else None
        if codes is None or scale is None or is_blocked(node) or node.outputs[0].is_graph_output():
            continue
        zero_point = zero_point_of(node)
        zero = state.constant(zero_point) if zero_point is not None else np.zeros((), np.int32)
        if zero is None:
            continue
        axis = channel_axis(node)
        # 64 bits hold the difference of any two codes
        exact = codes.astype(np.int64) - _along(zero, codes.ndim, axis).astype(np.int64)
        with np.errstate(over="ignore"):
            bias = (exact.astype(np.float32) * _along(scale, codes.ndim, axis).astype(np.float32)).astype(scale.dtype)
        assert node.inputs[0] is not None
        name = str(node.inputs[0].name)
        folded = state.initializer(f"{name}_float", bias)
        state.changes.biases[str(folded.name)] = f"{name} {list(codes.shape)} int32"
        node.outputs[0].replace_all_uses_with(folded)


def _is_int32(node: ir.Node) -> bool:
    codes = node.inputs[0] if is_standard(node, DEQUANTIZE) else None
    return codes is not None and codes.dtype is ir.DataType.INT32


def _along(values: Array, rank: int, axis: int) -> Array:
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape)
