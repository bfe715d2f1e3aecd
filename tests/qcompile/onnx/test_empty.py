"""Reductions and reshapes of empty tensors, judged by ONNX Runtime and onnx.reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompile.onnx.empty import allow_empty


def both(model: onnx.ModelProto, x: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [run.run(None, {"x": x})[0] for run in (session, ReferenceEvaluator(model))]


def graph(nodes: list[onnx.NodeProto], constants: dict[str, Any], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x [B, S, 4] -> nodes -> y."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 4])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    loaded = ir.serde.deserialize_model(model)
    allow_empty(loaded)
    return ir.serde.serialize_model(loaded)


@pytest.mark.parametrize("axes", [[-1], [-2, -1], [2], [0, -1]], ids=str)
@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceSum", "ReduceL2"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_are_counted_from_the_front(op_type: str, axes: list[int], keepdims: int) -> None:
    node = helper.make_node(op_type, ["x", "axes"], ["y"], keepdims=keepdims)
    model = tidied(graph([node], {"axes": np.array(axes)}))
    for lead in [(0, 3), (2, 0), (2, 3)]:
        x = np.random.default_rng(0).standard_normal((*lead, 4)).astype(np.float32)
        runtime, reference = both(model, x)
        np.testing.assert_allclose(runtime, reference, rtol=1e-6)
    constants = {value.name: numpy_helper.to_array(value).tolist() for value in model.graph.initializer}
    assert constants[model.graph.node[0].input[1]] == [axis % 3 for axis in axes]


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
def test_axes_that_are_attributes(op_type: str) -> None:
    model = tidied(graph([helper.make_node(op_type, ["x"], ["y"], axis=-1)], {}, TensorProto.INT64))
    runtime, reference = both(model, np.zeros((0, 3, 4), np.float32))
    assert runtime.shape == reference.shape == (0, 3, 1)


def test_one_constant_for_inputs_of_two_ranks() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x", "last"], ["rows"], keepdims=0),
        helper.make_node("ReduceMax", ["rows", "last"], ["y"], keepdims=0),
    ]
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    before = onnx.shape_inference.infer_shapes(graph(nodes, {"last": np.array([-1])}))
    for found in both(tidied(before), x):
        np.testing.assert_array_equal(found, x.max((1, 2)))


def test_a_rank_that_is_not_known_and_axes_that_are_computed_stay() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x", "last"], ["rows"], keepdims=0),
        helper.make_node("ReduceMax", ["rows", "last"], ["first"], keepdims=0),  # nobody inferred the shape of rows
        helper.make_node("Shape", ["first"], ["axis"]),
        helper.make_node("ReduceMax", ["x", "axis"], ["y"]),
    ]
    model = tidied(graph(nodes, {"last": np.array([-1])}))
    assert [node.input[1] for node in model.graph.node if node.op_type == "ReduceMax"] == ["axes_2", "last", "axis"]


def reshape(parts: list[str], constants: dict[str, Any]) -> onnx.ModelProto:
    """x [B, S, 4] reshaped to the sizes `parts`, of which b and s are those of x."""
    nodes = [
        helper.make_node("Shape", ["x"], ["b"], start=0, end=1),
        helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
        helper.make_node("Concat", parts, ["sizes"], axis=0),
        helper.make_node("Reshape", ["x", "sizes"], ["y"]),
    ]
    return tidied(graph(nodes, {name: np.array(value) for name, value in constants.items()}))


@pytest.mark.parametrize(("lead", "shape"), [((2, 0), (2, 2, 2, 0)), ((0, 3), (0, 2, 2, 3)), ((2, 3), (2, 2, 2, 3))])
def test_sizes_that_are_computed_may_be_zero(lead: tuple[int, int], shape: tuple[int, ...]) -> None:
    model = reshape(["b", "two", "two", "s"], {"two": [2]})
    for found in both(model, np.zeros((*lead, 4), np.float32)):
        assert found.shape == shape


@pytest.mark.parametrize("constant", [-1, 0])
def test_a_constant_that_is_no_size_keeps_its_meaning(constant: int) -> None:
    """-1 is what is left, and 0 as it was."""
    model = reshape(["b", "other", "four"], {"other": [constant], "four": [4]})
    assert not any(attribute.name == "allowzero" for attribute in model.graph.node[-1].attribute)
    for found in both(model, np.zeros((2, 3, 4), np.float32)):
        assert found.shape == (2, 3, 4)
