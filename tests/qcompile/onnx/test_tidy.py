"""What is left to do on a model of torch.onnx, judged by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from qcompile.onnx.tidy import tidy


def two_layers() -> onnx.ModelProto:
    """INT8 layers of one width that share the zero points of their channels, as torch.onnx writes them."""
    rng, node = np.random.default_rng(0), helper.make_node
    constants = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "t": np.full(16, 0.01, np.float32),
        "zeros": np.zeros(16, np.int8),
        "v": rng.integers(-127, 127, (16, 16)).astype(np.int8),
        "w": rng.integers(-127, 127, (16, 16)).astype(np.int8),
    }
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    for name in ("v", "w"):
        nodes.append(node("DequantizeLinear", [name, "t", "zeros"], [f"{name}_float"], axis=1))
        nodes.append(node("MatMul", ["d", f"{name}_float"], [f"{name}_out"]))
    graph = helper.make_graph(
        [*nodes, node("Add", ["v_out", "w_out"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """At the default level, with the option that INT8 needs on x86 CPUs without VNNI."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_int8_weights_have_zero_points_of_their_own() -> None:
    """Where they share them, the session is refused on a CPU without VNNI."""
    loaded = ir.serde.deserialize_model(two_layers())
    tidy(loaded)
    model = ir.serde.serialize_model(loaded)
    used = [n.input[2] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in ("v", "w")]
    assert len(set(used)) == 2
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(two_layers().SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], plain.run(None, {"x": x})[0], rtol=1e-4)
