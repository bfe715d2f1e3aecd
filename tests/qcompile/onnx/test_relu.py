"""No file of ours has a Relu that ONNX Runtime drops; sessions of other files stay at "basic" and say so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.errors import QCompileError
from qcompile.onnx.relu import dropped_relus, relus_to_max

LEVELS = onnxruntime.GraphOptimizationLevel
MOVES = {
    "nothing": [],
    "reshape": [("Reshape", ["flat"], {})],
    "transpose": [("Transpose", [], {"perm": [1, 0, 2]})],
    "identity": [("Identity", [], {})],
    "casts": [("Cast", [], {"to": TensorProto.FLOAT}), ("Cast", [], {"to": TensorProto.FLOAT})],
}


def fp8_layer(
    activation: str = "Relu",
    moves: str = "nothing",
    *,
    function: bool = False,
    readers: int = 1,
    dtype: Any = np.float32,
) -> onnx.ModelProto:
    """x [3, 4, 16] -> activation -> moves -> FP8 Q/DQ -> MatMul -> Add: opens at every level, with or without Relu."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    constants = {
        "s": np.array(2**-5, dtype),
        "z": zero,
        "w": (rng.standard_normal((16, 16)) * 30).astype(zero.dtype),
        "b": rng.standard_normal(16).astype(dtype),
        "flat": np.array([-1, 16]),
        "nought": np.zeros((), dtype),
    }
    node = helper.make_node
    first = node(activation, ["x", "nought"] if activation in ("Max", "Clip") else ["x"], ["r"], name="first")
    functions = []
    if function:
        functions = [helper.make_function("own", "Act", ["x"], ["r"], [first], [helper.make_opsetid("", 21)])]
        first = node("Act", ["x"], ["r"], name="call", domain="own")
    nodes, at = [first], "r"
    for count, (op_type, inputs, attributes) in enumerate(MOVES[moves]):
        nodes.append(node(op_type, [at, *inputs], [f"m{count}"], **attributes))
        at = f"m{count}"
    nodes += [
        node("QuantizeLinear", [at, "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        node("DequantizeLinear", ["w", "s", "z"], ["dw"]),
        node("MatMul", ["dq", "dw"], ["product"]),
        node("Add", ["product", "b"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    if readers > 1:
        outputs.append(helper.make_tensor_value_info("r", kind, None))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, [3, 4, 16])], outputs, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)


def plain(model: onnx.ModelProto, level: Any, x: Any) -> Any:
    """`model` in a session without anything of qcompile's."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(1).standard_normal((3, 4, 16)).astype(np.float32) * 4


@pytest.mark.parametrize("moves", MOVES)
def test_max_is_right_where_relu_is_dropped(moves: str, x: Any) -> None:
    """If the first assertion fails, ONNX Runtime has learned that FP8 has negatives, and this module can go."""
    source = fp8_layer(moves=moves)
    right = plain(source, LEVELS.ORT_DISABLE_ALL, x)
    assert np.abs(plain(source, LEVELS.ORT_ENABLE_ALL, x) - right).max() > 0.5
    model = ir.from_proto(source)
    assert relus_to_max(model) == 1 and relus_to_max(model) == 0
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_EXTENDED, LEVELS.ORT_ENABLE_ALL):
        np.testing.assert_allclose(plain(ir.to_proto(model), level, x), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_max_is_relu_for_every_number(dtype: Any) -> None:
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-7, -1e-7, 6e4, -6e4, 3, -3, 448, -449, 0.5, 1, 2], dtype)
    x = np.broadcast_to(x, (3, 4, 16)).copy()
    source = fp8_layer(dtype=dtype)
    model = ir.from_proto(source)
    relus_to_max(model)
    np.testing.assert_array_equal(
        plain(ir.to_proto(model), LEVELS.ORT_ENABLE_ALL, x), plain(source, LEVELS.ORT_DISABLE_ALL, x)
    )


def test_other_relus_stay() -> None:
    relu_of_int8 = fp8_layer()
    for tensor in relu_of_int8.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((), np.int8), "z"))
    far = fp8_layer()
    far.graph.node.insert(1, helper.make_node("Mul", ["r", "s"], ["scaled"]))
    far.graph.node[2].input[0] = "scaled"
    for model in (relu_of_int8, far, fp8_layer("Max"), fp8_layer("Clip")):
        assert not dropped_relus(ir.from_proto(model))


@pytest.mark.parametrize("form", ["file", "bytes", "function", "external"])
def test_a_session_stays_at_basic_and_says_so(
    form: str, x: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fp8_layer(function=form == "function")
    path = tmp_path / "m.onnx"
    onnx.save(source, path, save_as_external_data=form == "external", location="m.data", size_threshold=0)
    right = plain(fp8_layer(), LEVELS.ORT_DISABLE_ALL, x)
    options = onnxruntime.SessionOptions()  # all optimizations, as ONNX Runtime has it
    given = source.SerializeToString() if form == "bytes" else path
    with caplog.at_level(logging.WARNING, "qcompile"):
        session = qcompile.onnx_session(given, sess_options=options)
    (message,) = caplog.messages
    assert "ORT_ENABLE_BASIC instead of ORT_ENABLE_ALL" in message
    assert "Relu 'first" in message and "wrong numbers" in message
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], right, rtol=1e-6, atol=1e-6)
    assert options.graph_optimization_level == LEVELS.ORT_ENABLE_ALL
    session.set_providers(["CPUExecutionProvider"])  # opens the file anew
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC])
def test_a_low_level_is_kept_without_a_word(level: Any, caplog: pytest.LogCaptureFixture) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    qcompile.onnx_session(fp8_layer().SerializeToString(), sess_options=options)
    assert options.graph_optimization_level == level and not caplog.messages


def test_a_right_file_is_opened_as_asked(x: Any, caplog: pytest.LogCaptureFixture) -> None:
    options = onnxruntime.SessionOptions()
    session = qcompile.onnx_session(fp8_layer("Max").SerializeToString(), sess_options=options)
    assert not caplog.messages
    right = plain(fp8_layer(), LEVELS.ORT_DISABLE_ALL, x)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], right, rtol=1e-6, atol=1e-6)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(QCompileError, match=r"the serialized model is cut off or is no ONNX file"):
        qcompile.onnx_session(b"\xff" * 40, sess_options=onnxruntime.SessionOptions())


def test_repair_writes_the_relu_of_other_tools_as_max(x: Any, tmp_path: Path) -> None:
    onnx.save(fp8_layer(moves="reshape"), tmp_path / "old.onnx")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert report.changed and report.relus == 1
    new = onnx.load(tmp_path / "new.onnx")
    right = plain(fp8_layer(moves="reshape"), LEVELS.ORT_DISABLE_ALL, x)
    np.testing.assert_allclose(plain(new, LEVELS.ORT_ENABLE_ALL, x), right, rtol=1e-6, atol=1e-6)
