#!/usr/bin/env bash
# ONNX Runtime's quantize_dynamic fails on a Gemm whose weight also stands in value_info, as torch's exporter writes it.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6.
# A Gemm with transB=1, which nn.Linear on two axes becomes; the model passes the full check. quantize_dynamic turns the
# Gemm into a MatMul and stores its weight transposed under the same name. A shape of the old weight in value_info, which
# is legal and written by torch.onnx.export(dynamo=True), stays, and the shape inference behind it stops:
# "Inferred shape and existing shape differ in dimension 0". Without that entry, or after quant_pre_process, it works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 sympy==1.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import InferenceError
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process


def write(path, stated):
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "linear",
        [value("x", 2, 4)],
        [value("y", 2, 3)],
        [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")],
        value_info=[value("w", 3, 4)] if stated else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def outcome(path):
    try:
        quantize_dynamic(path, "quantized.onnx")
    except InferenceError as error:
        return "InferenceError: " + str(error).partition("] ")[2]
    return "quantized"


write("plain.onnx", stated=False)
write("stated.onnx", stated=True)
quant_pre_process("stated.onnx", "prepared.onnx")
found = {name: outcome(f"{name}.onnx") for name in ("plain", "stated", "prepared")}
for name, said in found.items():
    print(f"{name}: {said}")
as_seen = found["plain"] == found["prepared"] == "quantized" and "differ in dimension 0: (4) vs (3)" in found["stated"]
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
