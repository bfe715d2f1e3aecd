#!/usr/bin/env bash
# ONNX's Clip with a minimum alone turns an infinity into the largest finite number.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, opset 21.
# The operator's absent bounds are numeric_limits::lowest() and max(), not infinities. ONNX Runtime does so: Clip(inf, min=0.001)
# is 3.4e38 in float32 and 65504 in float16, and Clip(-inf, max=1) is the lowest finite number. onnx.reference keeps the
# infinity, as torch.clamp and numpy.clip do. A graph with a floor under a measured range (amax.clamp_min) so hides an overflow
# in one runtime and shows it in the other.
# What helps: Max and Min, which keep infinities in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def bounded(operator, inputs, kind, value, bound):
    """`value` through `operator` in onnx.reference and in ONNX Runtime."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"])], "bounded",
        [helper.make_tensor_value_info("x", dtype, [1])], [helper.make_tensor_value_info("y", dtype, [1])],
        [numpy_helper.from_array(np.array(bound, kind), "bound")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    x = np.array([value], kind)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return float(ReferenceEvaluator(model).run(None, {"x": x})[0][0]), float(session.run(None, {"x": x})[0][0])


changed = False
for kind in (np.float32, np.float16):
    for value, bound, inputs, other in (
        (np.inf, 1e-3, ["x", "bound"], "Max"),
        (-np.inf, 1.0, ["x", "", "bound"], "Min"),
    ):
        clip = bounded("Clip", inputs, kind, value, bound)
        plain = bounded(other, ["x", "bound"], kind, value, bound)
        print(f"{kind.__name__} {value}, (reference, ONNX Runtime): Clip {clip}, {other} {plain}")
        changed |= clip != (value, float(np.copysign(np.finfo(kind).max, value))) or plain != (value, value)
raise SystemExit("this has changed" if changed else 0)
PYTHON
