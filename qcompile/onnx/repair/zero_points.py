"""FP8 zero points other than 0, written out: TensorRT ignores them, and onnx.reference refuses them.

    before:  x, s, z     -> QuantizeLinear               after:  x -> Cast -> Div s -> Add z -> QuantizeLinear, scale 1
    before:  codes, s, z -> DequantizeLinear             after:  codes -> DequantizeLinear, scale 1 -> Sub z -> Mul s
                                                                 -> Cast

The formulas of the standard, saturate(x / s + z) and (codes - z) * s, in float32, where codes - z is exact. Folding z
into the scale or into the data instead would round once more. It costs kernels, and the GEMM behind is not an FP8 one.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.legacy import QUANTIZE, channel_axis, describe, zero_point_of
from qcompile.onnx.repair.state import State, insert


def write_out_zero_points(state: State) -> None:
    """*Requires*: weights are folded, ranks inferred."""
    for node in list(state.fp8_nodes()):
        zero = zero_point_of(node)
        values = state.constant(zero)
        if zero is None or values is None or not values.astype(np.float32).any():
            continue
        scale = state.constant(node.inputs[1])
        if scale is None:
            raise RepairError(f"{describe(node)} has a zero point other than 0 and a scale that is computed")
        if np.isnan(values.astype(np.float32)).any():
            raise RepairError(f"{describe(node)}: its zero point '{zero.name}' is NaN")
        state.changes.zero_points.append(describe(node))
        s = state.initializer(f"{node.name}_scale_float", _shaped(node, scale))
        z = state.initializer(f"{node.name}_zero_point_float", _shaped(node, values))
        (_quantize if node.op_type == QUANTIZE else _dequantize)(state, node, s, z, ir.DataType.from_numpy(scale.dtype))
        node.replace_input_with(1, state.initializer("fp8_unit_scale", np.ones((), np.float32)))
        node.replace_input_with(2, state.zero_point(()))
        node.attributes.pop("axis", None)


def _shaped(node: ir.Node, values: Array) -> Array:
    """In float32, along the axis of the data that they belong to."""
    values = values.astype(np.float32)
    if values.size == 1:
        return values.reshape(())
    axis, x = channel_axis(node), node.inputs[0]
    assert x is not None
    if axis >= 0 and x.shape is None:
        raise RepairError(
            f"{describe(node)} has zero points other than 0 for each channel, and nothing says how many axes "
            f"'{x.name}' has; count the axis from the back"
        )
    behind = -axis - 1 if axis < 0 else len(x.shape or ()) - axis - 1
    return values.reshape(values.size, *[1] * behind)


def _quantize(state: State, node: ir.Node, scale: ir.Value, zero_point: ir.Value, _: ir.DataType) -> None:
    x = insert(node, "Cast", [node.inputs[0]], state, to=int(ir.DataType.FLOAT))
    x = insert(node, "Div", [x, scale], state)
    node.replace_input_with(0, insert(node, "Add", [x, zero_point], state))


def _dequantize(state: State, node: ir.Node, scale: ir.Value, zero_point: ir.Value, dtype: ir.DataType) -> None:
    old = node.outputs[0]
    assert node.graph is not None
    following = [
        ir.node("Sub", [old, zero_point], metadata_props=dict(node.metadata_props)),
        ir.node("Mul", [old, scale], metadata_props=dict(node.metadata_props)),
        ir.node("Cast", [old], {"to": int(dtype)}, metadata_props=dict(node.metadata_props)),
    ]
    name, users = old.name, list(old.uses())
    outputs = {index for index, value in enumerate(node.graph.outputs) if value is old}
    old.type, old.shape = None, None
    for made in following:
        made.outputs[0].name = made.name = state.name(f"{name}_{made.op_type.lower()}")
    for before, made in itertools.pairwise(following):
        made.replace_input_with(0, before.outputs[0])
    node.graph.insert_after(node, following)
    for user, index in users:
        if user not in following:
            user.replace_input_with(index, following[-1].outputs[0])
    if outputs:  # an output of the graph keeps its name
        old.name, following[-1].outputs[0].name = state.name(f"{name}_codes"), name
        for index in outputs:
            following[-1].outputs[0].type, following[-1].outputs[0].shape = ir.TensorType(dtype), old.shape
            node.graph.outputs[index] = following[-1].outputs[0]
