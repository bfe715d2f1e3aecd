#!/usr/bin/env bash
# NNCF writes INT4 weights of a Gemm with transB on the wrong axis: the file passes the full check, and nothing runs it.
#
# Versions: nncf 3.4.0, onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6.
# nncf.compress_weights(model, mode=INT4_SYM, group_size=32) of y = Gemm(x [2,64], w [48,64], transB=1): groups lie along
# the reduction axis, so the scales are [48,2], and DequantizeLinear says axis=0, by which they would have to be [2,64] (or
# so) with block_size 32. onnx.reference and ONNX Runtime both refuse it. The same weight in a MatMul is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nncf==3.4.0 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import nncf
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
w = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)


def compressed(operator):
    weight = w if operator == "Gemm" else np.ascontiguousarray(w.T)
    attributes = {"transB": 1} if operator == "Gemm" else {}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"], name="layer", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 48])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, all_layers=True)


def outcome(operator):
    model = compressed(operator)
    onnx.checker.check_model(model, full_check=True)
    (node,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shapes = {init.name: list(init.dims) for init in model.graph.initializer}
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        error = float(np.abs(session.run(None, {"x": x})[0] - x @ w.T).max() / np.abs(x @ w.T).max())
        said = "runs" if error < 0.3 else f"wrong by {error:.2g}"
    except Exception as refused:
        said = f"refused: {' '.join(str(refused).split())[:160]}"
    print(f"{operator}: codes {shapes[node.input[0]]}, scales {shapes[node.input[1]]}, axis={axis}: {said}")
    return shapes[node.input[1]], axis, said.partition(":")[0]


as_seen = outcome("Gemm") == ([48, 2], 0, "refused") and outcome("MatMul")[2] == "runs"
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
