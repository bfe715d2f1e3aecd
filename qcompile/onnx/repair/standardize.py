"""Legacy quantizers become standard ones.

    before:  x, scale [, zero_point]                 -> trt::TRT_FP8QuantizeLinear   -> codes, declared uint8
             codes, scale                            -> trt::TRT_FP8DequantizeLinear -> y
    after:   x, scale, fp8_zero_point                -> QuantizeLinear               -> codes, FLOAT8E4M3FN
             codes, scale, fp8_zero_point            -> DequantizeLinear             -> y

The standard names in the `trt` domain, and in ONNX Runtime's, likewise. Scales become a scalar or one value for each
channel, zero points FP8 (some writers store their byte as uint8) and of the scale's shape, codes that are stored as
uint8 FP8 (the same bytes).
An integer or a block-scaled quantizer changes its domain only.

*Raises*: RepairError for a scale that is missing, computed at run time, NaN or not > 0; for a zero point that is NaN or
computed; for a quantizer that does not say its type.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.legacy import (
    DEQUANTIZE,
    FP8,
    FP8_NAMES,
    MICROSOFT,
    MOVES,
    QUANTIZE,
    channel_axis,
    describe,
    is_blocked,
    is_legacy,
    is_standard,
    zero_point_of,
)
from qcompile.onnx.repair.state import State

_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def standardize(state: State) -> None:
    """Every legacy quantizer of the graph, in order, so that a Q is known when its DQ is met."""
    for node in state.nodes():
        if is_legacy(node, state.model.functions):
            _standardize(state, node)


def _standardize(state: State, node: ir.Node) -> None:
    where, old = describe(node), f"{node.domain}::{node.op_type}".removeprefix("::")
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        raise RepairError(f"{where} has no scale: write the file again with the tool that made it")
    fp8 = node.op_type in FP8_NAMES or (not is_blocked(node) and _says_fp8(node))
    node.op_type, node.domain = FP8_NAMES.get(node.op_type, node.op_type), ""
    state.changes.standardized[old] += 1
    state.converted.add(node)
    if fp8 and is_blocked(node):
        raise RepairError(f"{where} has block scales, which {old} does not define; use the standard operator")
    if not fp8:
        return
    node.attributes.pop("output_dtype", None)  # the zero point says it, and opset 19 has no such attribute
    if node.op_type == QUANTIZE:
        _retype(node.outputs[0])
    else:
        node.replace_input_with(0, _codes(state, node.inputs[0], where))
    _scale(state, node, where)
    _zero_point(state, node, where)


def _says_fp8(node: ir.Node) -> bool:
    """Whether a quantizer with a standard name is FP8, from its zero point, its codes, or `output_dtype`."""
    zero = zero_point_of(node)
    if zero is not None and zero.dtype is not None:
        return zero.dtype is FP8
    if node.op_type == DEQUANTIZE:
        return _code_type(node.inputs[0]) is FP8
    stated = node.attributes.get("output_dtype")
    if node.domain == MICROSOFT and stated is None:
        return False
    if stated is None or not stated.as_int():
        raise RepairError(
            f"{describe(node)} has neither a zero point nor output_dtype, so that it may be FP8, int8 or uint8: "
            "give it a zero point of its type"
        )
    return ir.DataType(stated.as_int()) is FP8


def _code_type(value: ir.Value | None) -> ir.DataType | None:
    """Element type of codes; what the file says of the output of a Q that was repaired is right by now."""
    while value is not None and is_standard(value.producer(), *MOVES):
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    return value.dtype if value is not None else None


def _retype(value: ir.Value) -> None:
    """`value`, and what only moves its elements, holds FP8 codes, whatever the file says."""
    value.type = ir.TensorType(FP8)
    for user in value.consumers():
        if is_standard(user, *MOVES):
            _retype(user.outputs[0])


def _codes(state: State, value: ir.Value | None, where: str) -> ir.Value | None:
    """FP8 codes in place of the bytes that `value` holds."""
    if value is None or _code_type(value) is FP8:
        return value
    array = state.constant(value)
    if array is None or value.dtype not in (None, *_BYTES):
        found = value.dtype.name if value.dtype is not None else "of an unknown type"
        raise RepairError(f"{where} reads '{value.name}', which is {found} and not the output of an FP8 quantizer")
    evaluate = state.evaluator(value)
    return state.lazy_weight(f"{value.name}_fp8", tuple(array.shape), lambda: _as_fp8(evaluate()))


def _as_fp8(array: Array) -> Array:
    return np.ascontiguousarray(array).view(ml_dtypes.float8_e4m3fn)


def _scale(state: State, node: ir.Node, where: str) -> None:
    value = node.inputs[1]
    assert value is not None
    scale = state.constant(value)
    if scale is None:
        raise RepairError(
            f"{where}: its scale '{value.name}' is computed at run time; FP8 GEMMs need constant scales, "
            "so calibrate the model and write the file again"
        )
    if ir.DataType.from_numpy(scale.dtype) not in _FLOATS:
        raise RepairError(f"{where}: its scale '{value.name}' is {scale.dtype}, not float32, float16 or bfloat16")
    numbers = scale.astype(np.float32)
    bad = ~((numbers > 0) & np.isfinite(numbers))
    if not scale.size or bad.any():
        first = float(numbers[bad].flat[0]) if scale.size else "none"
        raise RepairError(
            f"{where}: its scale '{value.name}' has {int(bad.sum())} of {scale.size} values not > 0 and finite "
            f"(the first: {first}); calibrate again"
        )
    flat, axis = _granularity(node, scale, where)
    if flat.shape != scale.shape:
        node.replace_input_with(1, state.initializer(f"{value.name}_{'flat' if flat.ndim else 'scalar'}", flat))
    node.attributes.pop("axis", None)
    if axis is not None:
        node.attributes["axis"] = ir.AttrInt64("axis", axis)


def _granularity(node: ir.Node, scale: Array, where: str) -> tuple[Array, int | None]:
    """The scale as a scalar, or with one value for each channel and their axis ([N, 1, 1] is axis 0 of three)."""
    if scale.size == 1:
        return scale.reshape(()), None
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if len(axes) > 1:
        raise RepairError(f"{where}: a scale of shape {list(scale.shape)} is neither per tensor nor per channel")
    if scale.ndim > 1:
        return scale.reshape(-1), axes[0]
    return scale, channel_axis(node)


def _zero_point(state: State, node: ir.Node, where: str) -> None:
    """FP8, of the scale's shape; one that is not 0 stays and is written out by `zero_points`."""
    value = zero_point_of(node)
    scale = state.constant(node.inputs[1])
    assert scale is not None
    zero: Array = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)
    if value is not None:
        stored = state.constant(value)
        if stored is None:
            raise RepairError(f"{where}: its zero point '{value.name}' is computed at run time; give a constant")
        if stored.size not in (1, scale.size):
            raise RepairError(f"{where}: {stored.size} zero points in '{value.name}' for {scale.size} scales")
        if stored.dtype not in (np.uint8, np.int8, ml_dtypes.float8_e4m3fn):
            raise RepairError(f"{where}: its zero point '{value.name}' is {stored.dtype}, not FP8 e4m3")
        zero = np.broadcast_to(_as_fp8(stored).reshape(-1 if scale.ndim else ()), scale.shape)
    if np.isnan(zero.astype(np.float32)).any():
        raise RepairError(f"{where}: its zero point '{value.name if value else ''}' is NaN")
    nothing = not zero.astype(np.float32).any()  # -0 is 0
    made = state.zero_point(scale.shape) if nothing else state.initializer(f"{node.name}_zero_point", zero)
    node.resize_inputs(3)
    node.replace_input_with(2, made)
