#!/usr/bin/env bash
# QuantizeLinear to INT8 does not saturate: large positive numbers become -128.
#
# Versions: onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6, opset 21, scale 0.001, zero point 0.
# The operator is defined as saturate(round(x / scale) + zero_point), so what is above 127 * scale is 127.
# onnx.reference converts x / scale to int32 before it clips: beyond 2^31 * scale it gives -128 for positive numbers, with numpy's
# "invalid value encountered in cast" as the only sign. In float16 x / scale overflows first, so that 100 is -128 already.
# ONNX Runtime saturates finite numbers, and float32 infinity; a float16 +inf is -128.
# What helps: a reference in numpy that clips before it converts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

SCALE = 1e-3


def codes(kind, values):
    """The INT8 codes of `values` in onnx.reference and in ONNX Runtime."""
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node], "quantize",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, ["n"])],
        [numpy_helper.from_array(np.array(SCALE, kind), "scale"), numpy_helper.from_array(np.array(0, np.int8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    x = np.array(values, kind)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(model).run(None, {"x": x})[0].tolist(), session.run(None, {"x": x})[0].tolist()


VALUES = {np.float32: [1.0, 1e6, 1e7, 1e30, np.inf, -1e7], np.float16: [1.0, 60.0, 100.0, 65504.0, np.inf, -100.0]}
SEEN = {
    np.float32: ([127, 127, -128, -128, -128, -128], [127, 127, 127, 127, 127, -128]),
    np.float16: ([127, 127, -128, -128, -128, -128], [127, 127, 127, 127, -128, -128]),
}
changed = False
for kind, values in VALUES.items():
    found = codes(kind, values)
    print(f"{kind.__name__}: {values}\n  onnx.reference {found[0]}\n  ONNX Runtime   {found[1]}")
    changed |= found != SEEN[kind]
raise SystemExit("this has changed" if changed else 0)
PYTHON
