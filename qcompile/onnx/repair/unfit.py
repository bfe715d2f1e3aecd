"""FP8 around convolutions that TensorRT has no kernel for, and around max poolings.

    before:  codes (FP8, 7 x 7) -> DQ -> Conv               x -> Q -> DQ -> MaxPool
    after:   weight (float)           -> Conv               x -> MaxPool -> Q -> DQ

TensorRT computes such a convolution, and every transposed one, in floating point, and dequantizes its weight in each
run. A pooling keeps the largest of rounded numbers, which is the largest rounded.

*Ensures*: the same numbers. *Declines*: weights that something else reads, scales that are computed, or that are more
than one in front of a pooling; INT8 poolings, which ONNX Runtime computes on codes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from passes.capabilities import CONVOLUTIONS, is_plain_depthwise
from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.integers import along, fits
from qcompile.onnx.repair.legacy import DEQUANTIZE, FP8, QUANTIZE, is_blocked, is_standard
from qcompile.onnx.repair.state import State, follow


def float_weights(state: State) -> None:
    """*Requires*: weights are codes."""
    for node in state.nodes():
        if not is_standard(node, "Conv", "ConvTranspose"):
            continue
        weight = node.inputs[1]
        dequantize = weight.producer() if weight is not None else None
        if weight is None or dequantize is None or not is_standard(dequantize, DEQUANTIZE) or is_blocked(dequantize):
            continue
        codes, scale = dequantize.inputs[0], state.constant(dequantize.inputs[1])
        if codes is None or codes.dtype is not FP8 or scale is None or not state.is_constant(codes):
            continue
        others = len(list(weight.consumers())) > 1 or weight.is_graph_output()
        array = state.constant(codes)
        if others or array is None or not fits(scale, array.shape, dequantize) or not _is_unfit(node, array.shape):
            continue
        made = _values(state.evaluator(codes), scale, dequantize)
        dtype = ir.DataType.from_numpy(scale.dtype)
        stored = state.lazy_weight(f"{codes.name}_float", array.shape, made, dtype)
        state.changes.floats[str(stored.name)] = f"{codes.name} {list(array.shape)} {node.op_type}"
        node.replace_input_with(1, stored)


def _is_unfit(node: ir.Node, shape: tuple[int, ...]) -> bool:
    if node.op_type == "ConvTranspose":
        return True
    steps = {n for name in ("strides", "dilations") if name in node.attributes for n in node.attributes[name].as_ints()}
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return CONVOLUTIONS["fp8"].unfit(shape[2:], is_plain_depthwise(shape, groups, steps)) is not None


def _values(codes: Callable[[], Array], scale: Array, dequantize: ir.Node) -> Callable[[], Array]:
    def values() -> Array:
        array = codes()
        exact: Array = array.astype(np.float32) * along(scale, array.shape, dequantize).astype(np.float32)
        return exact.astype(scale.dtype)

    return values


def quantize_behind_pools(state: State) -> None:
    """*Requires*: FP8 Q and DQ are standard."""
    for pool in state.nodes():
        if not is_standard(pool, "MaxPool") or len(pool.outputs) > 1:
            continue
        dequantize = pool.inputs[0].producer() if pool.inputs[0] is not None else None
        if dequantize is None or not is_standard(dequantize, DEQUANTIZE) or not _is_alone(dequantize):
            continue
        quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
        if quantize is None or not is_standard(quantize, QUANTIZE) or not _is_alone(quantize):
            continue
        scale, codes = state.constant(quantize.inputs[1]), quantize.outputs[0]
        if codes.dtype is not FP8 or scale is None or scale.size > 1:
            continue
        pool.replace_input_with(0, quantize.inputs[0])
        made = follow(pool, QUANTIZE, list(quantize.inputs[1:]), state, **dict(quantize.attributes))
        last = made.producer()
        assert last is not None
        follow(last, DEQUANTIZE, list(dequantize.inputs[1:]), state, **dict(dequantize.attributes))
        made.type = codes.type
        state.changes.pools += 1


def _is_alone(node: ir.Node) -> bool:
    (output,) = node.outputs
    return len(list(output.consumers())) == 1 and not output.is_graph_output()
