#!/usr/bin/env bash
# ONNX Runtime's reductions do not reduce an empty tensor when the axis is counted from the end.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, opset 21.
# ReduceMax, ReduceMin, ReduceMean, ReduceSum, ReduceProd, ReduceL2, ReduceSumSquare and ReduceLogSumExp of x [0, 4] or [4, 0],
# axes = [-1]: the result has the shape of x, with a warning on an output of the graph and none inside it. onnx.reference, and
# ONNX Runtime itself with axes = [1], give [0] or [4] ([0, 1] or [4, 1] with keepdims). So an empty batch runs or ends in an
# error further down, by how an exporter happened to write the axis.
# What helps: axes counted from the front.
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

onnxruntime.set_default_logger_severity(3)
NAMES = ("Max", "Min", "Mean", "Sum", "Prod", "L2", "SumSquare", "LogSumExp")


def reduced(name, axis, shape, keepdims):
    """The shape of the result in ONNX Runtime."""
    node = helper.make_node(f"Reduce{name}", ["x", "axes"], ["y"], keepdims=keepdims)
    result = ["n", 1] if keepdims else ["n"]
    graph = helper.make_graph(
        [node], "reduction",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(np.array([axis], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(shape, np.float32)})[0].shape


changed = False
for name in NAMES:
    for shape in ((0, 4), (4, 0), (2, 4)):
        for keepdims in (0, 1):
            right = (shape[0], 1) if keepdims else (shape[0],)
            front, end = (reduced(name, axis, shape, keepdims) for axis in (1, -1))
            print(f"Reduce{name:10} of {shape}, keepdims {keepdims}: axis 1 {front}, axis -1 {end}")
            changed |= front != right or end != (right if 0 not in shape else shape)
raise SystemExit("this has changed" if changed else 0)
PYTHON
