"""Weights as FP8 codes: a Q of a constant is evaluated once, and codes are stored in the layout that the GEMM reads.

    before:  weight (float) [-> Cast, Transpose, ...] -> Q -> DQ -> Transpose -> MatMul
    after:   codes (FP8, transposed)                       -> DQ             -> MatMul

Division, zero point and clamping in float32, one rounding to e4m3 (ties to even), as in
https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html; NaN stays NaN. A scale for each channel stays one, on the axis
that its channels have after the Transpose. The float weight goes when nothing else reads it. Codes are computed while
the file is written, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.integers import code_type, integer_nodes
from qcompile.onnx.repair.legacy import (
    DEQUANTIZE,
    FP8,
    MOVES,
    QUANTIZE,
    channel_axis,
    describe,
    is_blocked,
    is_standard,
)
from qcompile.onnx.repair.state import State

FP8_MAX = 448.0
Known = dict[tuple[object, ...], ir.Value]  # codes that are stored already, by what they are made from


def quantized(x: Array, scale: Array, zero_point: Array, axis: int | None, *, saturate: bool = True) -> Array:
    """Codes of `x` of the type of `zero_point`; it and `scale` are scalars or lie along `axis`."""
    codes: Array = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = codes / _along(scale, x.ndim, axis)
        if zero_point.dtype != ml_dtypes.float8_e4m3fn:
            low, high = _limits(zero_point.dtype)
            codes = np.rint(codes) + _along(zero_point, x.ndim, axis)
            return np.clip(codes, low, high).astype(zero_point.dtype)
        if zero_point.astype(np.float32).any():  # adding 0 would make 0 of -0
            codes = codes + _along(zero_point, x.ndim, axis)
        if saturate:
            codes = np.clip(codes, -FP8_MAX, FP8_MAX)
        return codes.astype(ml_dtypes.float8_e4m3fn)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info: Any = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _along(values: Array, rank: int, axis: int | None) -> Array:
    shape = [1] * rank
    if axis is not None and values.ndim:
        shape[axis] = values.size
    return values.astype(np.float32).reshape(shape)


def fold_weights(state: State) -> None:
    """*Requires*: FP8 Q and DQ are standard, with constant scales."""
    codes: Known = {}
    for node in [*state.fp8_nodes(QUANTIZE), *integer_nodes(state, QUANTIZE)]:
        if _is_weight(state, node):
            _fold(state, node, codes)
    for node in list(state.fp8_nodes(DEQUANTIZE)):
        if node in state.converted and node.inputs[0] is not None and state.is_constant(node.inputs[0]):
            _store_where_it_is_read(state, node, codes)
            _store_as_it_is_read(state, node, codes)


def _is_weight(state: State, node: ir.Node) -> bool:
    x, scale = node.inputs[0], node.inputs[1]
    assert x is not None and scale is not None
    return not is_blocked(node) and all(map(state.is_constant, (x, scale))) and not node.outputs[0].is_graph_output()


def _fold(state: State, node: ir.Node, known: Known) -> None:
    x, scale, where = node.inputs[0], state.constant(node.inputs[1]), describe(node)
    dtype = code_type(node)
    assert dtype is not None
    zero_point = state.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), dtype.numpy())
    weight = state.constant(x)
    assert x is not None and scale is not None and weight is not None
    if zero_point is None:
        raise RepairError(f"{where}: its zero point is computed at run time; give a constant")
    if not np.issubdtype(weight.dtype, np.floating) and weight.dtype != ml_dtypes.bfloat16:
        raise RepairError(f"{where} quantizes '{x.name}', which is {weight.dtype} and no floating-point weight")
    axis = _channels(weight.shape, scale, channel_axis(node), where)
    saturate = node.attributes["saturate"].as_int() != 0 if "saturate" in node.attributes else True
    key = (x, scale.tobytes(), zero_point.tobytes(), dtype, axis, saturate)
    if key not in known:
        source = _source(x)
        make = partial(_quantize_later, state.evaluator(x), scale, zero_point, axis, saturate)
        suffix = "fp8" if dtype is FP8 else dtype.name.lower()
        known[key] = state.lazy_weight(f"{source}_{suffix}", weight.shape, make, dtype)
        per = "per tensor" if axis is None else f"per channel, axis {axis}"
        state.changes.folded[str(known[key].name)] = f"{source} {list(weight.shape)} {weight.dtype}, {per}"
    for user in node.outputs[0].consumers():
        state.converted.add(user)
    node.outputs[0].replace_all_uses_with(known[key])


def _quantize_later(
    weight: Callable[[], Array], scale: Array, zero_point: Array, axis: int | None, saturate: bool
) -> Array:
    return quantized(weight(), scale, zero_point, axis, saturate=saturate)


def _channels(shape: tuple[int, ...], scale: Array, axis: int, where: str) -> int | None:
    """The axis of a scale for each channel, counted from the front; None for a scalar."""
    if scale.size == 1:
        return None
    if not -len(shape) <= axis < len(shape) or shape[axis] != scale.size:
        raise RepairError(f"{where}: {scale.size} scales do not fit axis {axis} of a weight of shape {list(shape)}")
    return axis % len(shape)


def _source(value: ir.Value) -> str:
    """The name of the initializer that a constant is computed from, or its own."""
    node, name = value.producer(), str(value.name)
    while value.const_value is None and node is not None and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
        name = str(value.name)
    return name


def _store_where_it_is_read(state: State, node: ir.Node, known: Known) -> None:
    """Codes behind a Transpose: TensorRT takes quantized constants in front of their DQ only."""
    value = node.inputs[0]
    assert value is not None
    if value.const_value is not None or not is_standard(value.producer(), *MOVES, "Constant"):
        return
    array = state.constant(value)
    if array is not None and array.dtype == ml_dtypes.float8_e4m3fn:
        if (value,) not in known:
            name = f"{_source(value)}_stored"
            known[(value,)] = state.lazy_weight(name, array.shape, state.evaluator(value))
        node.replace_input_with(0, known[(value,)])


def _store_as_it_is_read(state: State, node: ir.Node, known: Known) -> None:
    """DQ -> Transpose becomes DQ of transposed codes, if all that read the weight read it so transposed."""
    codes, output = node.inputs[0], node.outputs[0]
    assert codes is not None and codes.const_value is not None
    readers = list(output.consumers())
    rank = len(codes.const_value.shape)
    perms = {_permutation(reader, rank) for reader in readers if is_standard(reader, "Transpose")}
    blocked = output.is_graph_output() or any(not is_standard(reader, "Transpose") for reader in readers)
    if blocked or len(perms) != 1 or any(reader.outputs[0].is_graph_output() for reader in readers):
        return
    (perm,) = perms
    shape = tuple(int(codes.const_value.shape.numpy()[axis]) for axis in perm)
    if (codes, perm) not in known:
        make: Callable[[], Array] = partial(_transposed, codes.const_value, perm)
        known[(codes, perm)] = state.lazy_weight(f"{codes.name}_transposed", shape, make)
    stored = known[(codes, perm)]
    node.replace_input_with(0, stored)
    if str(codes.name) in state.changes.folded:
        state.changes.folded[str(stored.name)] = f"{state.changes.folded[str(codes.name)]}, stored as {list(shape)}"
    scale = state.constant(node.inputs[1])
    if scale is not None and scale.ndim:
        node.attributes["axis"] = ir.AttrInt64("axis", perm.index(channel_axis(node) % rank))
    for reader in readers:
        reader.outputs[0].replace_all_uses_with(output)
    output.shape = None
    state.changes.transposes += 1


def _permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    perm = node.attributes.get("perm")
    axes = tuple(range(rank))[::-1] if perm is None else tuple(axis % max(rank, 1) for axis in perm.as_ints())
    if sorted(axes) != list(range(rank)):
        raise RepairError(f"{describe(node)} transposes a weight of {rank} axes as if it had those of {list(axes)}")
    return axes


def _transposed(tensor: ir.TensorProtocol, perm: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(np.asarray(tensor.numpy()).transpose(perm))
