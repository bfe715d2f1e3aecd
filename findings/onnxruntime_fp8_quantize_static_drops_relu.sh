#!/usr/bin/env bash
# ONNX Runtime's quantize_static to FP8 removes the Relu behind a convolution: the file gives negative numbers.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6.
# A Relu between a convolution and a quantizer is removed in the belief that the quantizer clips at its zero point. That
# holds for the asymmetric INT8 of the default, whose zero point is the smallest code. FP8 has none but 0, which clips
# nothing, so the Relu is lost, with no word: of the two files neither has a Relu, the one in INT8 gives no negative
# number, and the one in FP8 does.
# What helps: extra_options={"ActivationSymmetric": True}, which keeps the Relu and changes no scale, as FP8 is symmetric.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 sympy==1.14.0
cd "$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

rng = np.random.default_rng(0)
weight = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
x = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"], name="relu")],
    "convolution",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 6, 6))],
    [numpy_helper.from_array(weight, "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "model.onnx")


class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": x}])

    def get_next(self):
        return next(self.batches, None)


def quantized(kind, method, **extra):
    """Operators of the quantized file, and the smallest number that it gives."""
    quantize_static(
        "model.onnx",
        "quantized.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=kind,
        weight_type=kind,
        calibrate_method=method,
        extra_options=extra,
    )
    options = onnxruntime.SessionOptions()  # as written: the CPU has no fused FP8 convolution
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (result,) = onnxruntime.InferenceSession("quantized.onnx", options).run(None, {"x": x})
    operators = {node.op_type for node in onnx.load("quantized.onnx").graph.node}
    return "Relu" in operators, float(result.min())


fp8, int8 = (QuantType.QFLOAT8E4M3FN, CalibrationMethod.Distribution), (QuantType.QInt8, CalibrationMethod.MinMax)
found = {
    "INT8": quantized(*int8),
    "FP8": quantized(*fp8),
    "FP8, ActivationSymmetric": quantized(*fp8, ActivationSymmetric=True),
}
for name, (has_relu, smallest) in found.items():
    print(f"{name}: Relu {'kept' if has_relu else 'removed'}, smallest output {smallest:.2f}")
as_seen = found["INT8"] == (False, 0.0) and not found["FP8"][0] and found["FP8"][1] < -0.5
as_seen &= found["FP8, ActivationSymmetric"] == (True, 0.0)
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
