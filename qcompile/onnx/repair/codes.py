"""Stored integer codes: in the type, the range and the place that TensorRT takes them in.

    before:                                                  after:
    codes -> Clip, Transpose, ... -> DQ                      codes, computed      -> DQ
    uint8 codes, zero point 128 -> DQ                        codes - 128 (int8)   -> DQ
    int8 codes, zero point z    -> DQ                        codes - z            -> DQ, if they fit
    int8 codes, scale < 0       -> DQ                        -codes, -scale       -> DQ, if they fit, else DQ -> Mul -1
    int4 codes -> DQ, beside INT8 activations                the codes (int8)     -> DQ

*Ensures*: the same numbers behind every DQ. A zero point that does not fit stays, for `offsets`; of INT4 codes, where
`blocks` can subtract it, and with INT8 codes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.blocks import products_of
from qcompile.onnx.repair.integers import SHIFT, SIGNED, along, code_type, fits, integer_nodes, set_zero, zeros
from qcompile.onnx.repair.legacy import DEQUANTIZE, MOVES, is_blocked, is_standard
from qcompile.onnx.repair.state import State, follow

_LIMITS = {ir.DataType.INT8: (-128, 127), ir.DataType.INT4: (-8, 7)}
Known = dict[tuple[object, ...], ir.Value]


def store_codes(state: State) -> None:
    """*Requires*: float weights are codes, types are inferred."""
    known: Known = {}
    for node in integer_nodes(state, DEQUANTIZE):
        value = node.inputs[0]
        if value is not None and code_type(node) in (*_LIMITS, *SIGNED) and state.is_constant(value):
            _store(state, node, value, known)


def _store(state: State, node: ir.Node, value: ir.Value, known: Known) -> None:
    codes, scale, zero = state.constant(value), state.constant(node.inputs[1]), zeros(state, node)
    if codes is None or scale is None or zero is None:
        return
    if not (fits(scale, codes.shape, node) and fits(zero, codes.shape, node)):
        return  # the check of scales names it
    old = code_type(node)
    assert old is not None
    shift, left, dtype = _shift(codes, zero, old, node)
    if dtype is ir.DataType.INT4 and not is_blocked(node) and _meets_int8(node):
        dtype = ir.DataType.INT8
    signs = np.ones_like(scale) if dtype is ir.DataType.INT4 else np.sign(scale)
    spread = along(signs, codes.shape, node).astype(np.int64)
    flips = bool(((codes.astype(np.int64) - shift) * spread <= _LIMITS[dtype][1]).all())
    sign = spread if flips else np.ones((), np.int64)
    moved = value.const_value is None and not is_standard(value.producer(), "Constant")
    if moved or shift.any() or dtype is not old or (sign != 1).any():
        key = (value, dtype, shift.tobytes(), shift.shape, sign.tobytes(), sign.shape)
        if key not in known:
            make = partial(_made, state.evaluator(value), shift, sign, dtype)
            known[key] = state.lazy_weight(f"{value.name}_{dtype.name.lower()}", codes.shape, make, dtype)
            state.changes.codes[str(known[key].name)] = f"{value.name} {list(codes.shape)} {old.name.lower()}"
        node.replace_input_with(0, known[key])
        set_zero(state, node, left, dtype)
    if (signs != 1).any():
        _set_positive(state, node, scale)
    if not flips:
        spread = along(signs, codes.shape, node)
        follow(node, "Mul", [state.initializer(f"{node.name}_sign", spread.astype(scale.dtype))], state)
        state.changes.codes[str(value.name)] = f"{value.name} {list(codes.shape)}, with scales of both signs"


def _set_positive(state: State, node: ir.Node, scale: Array) -> None:
    positive = np.where(scale == 0, np.ones_like(scale), np.abs(scale))
    assert node.inputs[1] is not None
    node.replace_input_with(1, state.initializer(f"{node.inputs[1].name}_positive", positive))


def _shift(codes: Array, zero: Array, dtype: ir.DataType, node: ir.Node) -> tuple[Array, Array, ir.DataType]:
    """What to subtract from the codes, the zero point that is left, and the type: no zero point where a type fits."""
    spread = along(zero, codes.shape, node)
    exact = codes.astype(np.int64) - spread
    signed = SIGNED.get(dtype, dtype)
    for wide in (signed,) if signed is ir.DataType.INT4 and products_of(node) else (signed, ir.DataType.INT8):
        low, high = _LIMITS[wide]
        if not exact.size or (exact.min() >= low and exact.max() <= high):
            return spread, np.zeros_like(zero), wide
    shift = np.array(SHIFT.get(dtype, 0), np.int64)
    return shift, zero - shift, signed


def _made(codes: Callable[[], Array], shift: Array, sign: Array, dtype: ir.DataType) -> Array:
    return ((codes().astype(np.int16) - shift.astype(np.int16)) * sign.astype(np.int16)).astype(dtype.numpy())


def _meets_int8(node: ir.Node) -> bool:
    """Whether what reads the weight multiplies it with codes of 8 bits."""
    for user in node.outputs[0].consumers():
        for value in user.inputs[:2]:
            other = value.producer() if value is not None else None
            while is_standard(other, *MOVES):
                assert other is not None and other.inputs[0] is not None
                other = other.inputs[0].producer()
            if other is not node and is_standard(other, DEQUANTIZE) and other is not None:
                return code_type(other) is ir.DataType.INT8
    return False
