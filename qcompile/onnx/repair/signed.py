"""Unsigned codes of activations become signed: TensorRT builds UINT8 as INT8, and cuts codes above 127.

    before:  x -> Q (uint8, zero point z)       -> Reshape, MaxPool, ... -> DQ (zero point z)
    after:   x -> Q (int8, zero point z - 128)  -> Reshape, MaxPool, ... -> DQ (zero point z - 128)

*Ensures*: the codes are 128 smaller everywhere, and what is dequantized is the same number.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.onnx.repair.integers import SHIFT, code_type, integer_nodes, set_zero, zeros
from qcompile.onnx.repair.legacy import DEQUANTIZE, MOVES, QUANTIZE, is_standard
from qcompile.onnx.repair.state import State

# They choose codes by their order, or by nothing.
_CHOOSES = MOVES | {"Concat", "Expand", "Gather", "MaxPool", "Slice", "Split", "Tile"}


def make_signed(state: State) -> None:
    """*Requires*: types are inferred. Codes that are inputs or outputs, or are computed with, stay as they are."""
    seen = set[ir.Value]()
    for node in integer_nodes(state, QUANTIZE):
        if code_type(node) is not ir.DataType.UINT8 or node.outputs[0] in seen:
            continue
        values = _reached(node.outputs[0])
        seen |= values
        quantizers = _quantizers(values)
        if quantizers is None or not all(_is_constant(state, quantizer) for quantizer in quantizers):
            continue
        for value in values:
            value.type = ir.TensorType(ir.DataType.INT8)
        for quantizer in quantizers:
            zero = zeros(state, quantizer)
            assert zero is not None
            set_zero(state, quantizer, zero - SHIFT[ir.DataType.UINT8], ir.DataType.INT8)
        state.changes.signed += sum(quantizer.op_type == QUANTIZE for quantizer in quantizers)


def _is_constant(state: State, node: ir.Node) -> bool:
    return zeros(state, node) is not None and state.constant(node.inputs[1]) is not None


def _reached(start: ir.Value) -> set[ir.Value]:
    """The tensors that hold codes of one another."""
    values, pending = set[ir.Value](), [start]
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values.add(value)
        for user in value.consumers():
            if is_standard(user, *_CHOOSES) and user.inputs[0] is not None:
                pending.extend(user.outputs)
        producer = value.producer()
        if is_standard(producer, *_CHOOSES):
            assert producer is not None
            pending.extend(used for used in _codes(producer) if used is not None)
    return values


def _codes(node: ir.Node) -> tuple[ir.Value | None, ...]:
    return tuple(node.inputs) if node.op_type == "Concat" else tuple(node.inputs[:1])


def _quantizers(values: set[ir.Value]) -> list[ir.Node] | None:
    """The Q and DQ around `values`; None if anything else makes or reads them."""
    found: dict[ir.Node, None] = {}
    for value in values:
        made = value.producer()
        if made is None or value.is_graph_output() or not is_standard(made, QUANTIZE, *_CHOOSES):
            return None
        for node in (made, *value.consumers()):
            if is_standard(node, QUANTIZE, DEQUANTIZE):
                found[node] = None
            elif not is_standard(node, *_CHOOSES):
                return None
    return list(found)
