#!/usr/bin/env bash
# ONNX Runtime turns a float16 bias into rubbish when the layer stands between quantizers.
#
# Versions: onnxruntime 1.31.1 (1.32.0 the same, seen by hand), onnx 1.23.2, numpy 2.4.6.
# A float16 layer with INT8 Q/DQ on its input and weight, a bias [N] that is added, and a Q on its output: from
# ORT_ENABLE_BASIC on (the default is ALL) the bias is quantized to INT32 with the scale sx * sw, computed in float16. A bias
# beyond 65504 * sx * sw overflows there. The result is wrong by more than its own size, with no warning; without optimizations
# it equals onnx.reference exactly, and in float32 at every level.
# What helps: a bias of shape [1, N], which the rewrite does not take; or ORT_DISABLE_ALL.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def layer(dtype, bias_shape):
    random = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {
        "sx": np.array(1 / 64, kind), "sw": np.array(1 / 1024, kind), "sy": np.array(1, kind), "zero": np.array(0, np.int8),
        "w": random.integers(-127, 128, (16, 8)).astype(np.int8),
        "bias": (random.normal(size=8) * 50).astype(kind).reshape(bias_shape),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zero"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "sx", "zero"], ["dx"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zero"], ["dw"]),
        helper.make_node("MatMul", ["dx", "dw"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "sy", "zero"], ["qy"]),
        helper.make_node("DequantizeLinear", ["qy", "sy", "zero"], ["y"]),
    ]
    inputs, outputs = ([helper.make_tensor_value_info(n, dtype, s)] for n, s in (("x", [4, 16]), ("y", [4, 8])))
    graph = helper.make_graph(nodes, "layer", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model, (np.random.default_rng(1).normal(size=(4, 16)) * 0.5).astype(kind)


changed = False
for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16):
    for shape in ((8,), (1, 8)):
        model, x = layer(dtype, shape)
        expected = ReferenceEvaluator(model).run(None, {"x": x})[0].astype(np.float64)
        for level in LEVELS:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            found = session.run(None, {"x": x})[0].astype(np.float64)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            wrong = dtype == TensorProto.FLOAT16 and shape == (8,) and level != "ORT_DISABLE_ALL"
            print(f"{TensorProto.DataType.Name(dtype):8} bias {shape!s:7} {level:20} relative error {error:.2g}")
            changed |= (error > 1) != wrong or (not wrong and error > 0.05)
raise SystemExit("this has changed" if changed else 0)
PYTHON
