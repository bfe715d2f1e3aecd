"""Biases in codes, as ONNX Runtime's, Quark's and AIMET's quantizers write them, become float.

    before:  codes [N] (int32), scale             -> DequantizeLinear -> Gemm, Conv, Add
             codes [N] (int8), scale, zero point  -> DequantizeLinear -> Add, LayerNormalization
             code (int8), scale                   -> DequantizeLinear -> Div
    after:   bias [N] (float)                                         -> Gemm, Conv, Add, LayerNormalization

TensorRT refuses to dequantize INT32, zero points, and a single number. The codes are dequantized as the standard says,
and as ONNX Runtime does: (codes - zero point) in float32, times the scale, rounded to the type of the scale. Codes
beyond 2^24 round to float32 first, and every bias once in the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.repair.integers import INTEGERS, code_type, dequantized, zeros
from qcompile.onnx.repair.legacy import DEQUANTIZE, is_blocked, is_standard
from qcompile.onnx.repair.state import State


def fold_biases(state: State) -> None:
    """*Requires*: nothing. One that is computed, or an output of the graph, or in blocks, stays as it is."""
    for node in state.nodes():
        if not is_standard(node, DEQUANTIZE) or is_blocked(node) or node.outputs[0].is_graph_output():
            continue
        codes, scale = node.inputs[0], state.constant(node.inputs[1])
        if codes is None or scale is None or not (_is_int32(codes) or _is_refused(state, node)):
            continue
        bias = dequantized(state, node)
        if bias is None:
            continue
        name = str(codes.name)
        with np.errstate(over="ignore"):
            folded = state.initializer(f"{name}_float", bias.astype(scale.dtype))
        state.changes.biases[str(folded.name)] = f"{name} {list(bias.shape)} {str(codes.dtype).lower()}"
        node.outputs[0].replace_all_uses_with(folded)


def _is_int32(codes: ir.Value) -> bool:
    return codes.dtype is ir.DataType.INT32


def _is_refused(state: State, node: ir.Node) -> bool:
    """One axis of stored codes with a zero point, or one number, which TensorRT's builder takes in no codes."""
    codes = state.constant(node.inputs[0]) if code_type(node) in INTEGERS else None
    zero = zeros(state, node)
    return codes is not None and zero is not None and (codes.ndim == 0 or (codes.ndim == 1 and bool(zero.any())))
