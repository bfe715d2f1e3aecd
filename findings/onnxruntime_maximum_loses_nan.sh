#!/usr/bin/env bash
# ONNX Runtime's ReduceMax and ReduceMin see a NaN only if it comes first.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, opset 21, CPU provider.
# A row of ones with one NaN: the maximum and the minimum are NaN where that is the first element, and 1 where it is any other.
# ReduceSum, ReduceMean and ReduceL2 give NaN at every place, and so do onnx.reference, numpy and torch for all five.
# A scale that is measured at run time (ReduceMax of Abs) is then finite, and INT8, which has no NaN, hides it for good.
# What helps: formats with a NaN; a sum beside the maximum.
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


def nan_seen(operator, width, place):
    """Whether `operator` of a row of ones with a NaN at `place` is NaN, in onnx.reference and in ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "axes"], ["y"], keepdims=1)], "reduction",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    x = np.ones((1, width), np.float32)
    x[0, place] = np.nan
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = (ReferenceEvaluator(model).run(None, {"x": x})[0], session.run(None, {"x": x})[0])
    return tuple(bool(np.isnan(y).all()) for y in runs)


changed = False
for operator in ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceL2"):
    for width in (4, 40):
        for place in (0, 1, width - 1):
            found = nan_seen(operator, width, place)
            print(f"{operator:10} of {width}, NaN at {place}: NaN in onnx.reference {found[0]}, in ONNX Runtime {found[1]}")
            changed |= found != (True, place == 0 or operator not in ("ReduceMax", "ReduceMin"))
raise SystemExit("this has changed" if changed else 0)
PYTHON
