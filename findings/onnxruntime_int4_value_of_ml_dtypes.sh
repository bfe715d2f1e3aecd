#!/usr/bin/env bash
# ONNX Runtime takes an array of ml_dtypes.int4 for an INT4 value and reads other numbers from it.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, ml_dtypes 0.5.4, numpy 2.4.6.
# ml_dtypes keeps a number of 4 bits in a byte of its own; onnx and onnx.reference hand INT4 tensors around so. ONNX
# Runtime keeps two in a byte. session.run refuses such an array ("Numpy_type ... can't be converted"), and
# OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.INT4) takes its bytes as they are: half of the numbers
# of the array are read, each followed by what fills its byte, and the others are not read at all. Nothing is said.
# What helps: a uint8 array of the logical shape, with the packed bytes in front.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 ml_dtypes==0.5.4 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession, OrtValue

numbers = np.array([-8, -3, 1, 2, 3, 5, 6, 7])
graph = helper.make_graph(
    [helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])],
    "dequantize",
    [helper.make_tensor_value_info("x", TensorProto.INT4, numbers.shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, numbers.shape)],
    [helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
session = InferenceSession(model.SerializeToString())


def of_value(array):
    value = OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.INT4)
    return session.run_with_ort_values(None, {"x": value})[0].numpy().tolist()


array = numbers.astype(ml_dtypes.int4)
nibbles = (numbers & 15).astype(np.uint8)
packed = np.zeros(numbers.shape, np.uint8)
packed[: len(numbers) // 2] = nibbles[::2] | nibbles[1::2] << 4
reference = ReferenceEvaluator(model).run(None, {"x": array})[0].tolist()
misread, right = of_value(array), of_value(packed)
print("the numbers:                        ", numbers.tolist())
print("onnx.reference, of ml_dtypes.int4:  ", reference)
print("ONNX Runtime, of ml_dtypes.int4:    ", misread)
print("ONNX Runtime, of packed bytes:      ", right)
as_seen = reference == right == numbers.tolist() and misread[::2] == numbers[:4].tolist()
raise SystemExit(0 if as_seen and misread != right else "behaviour has changed")
PYTHON
