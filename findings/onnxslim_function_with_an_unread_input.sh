#!/usr/bin/env bash
# onnxslim takes an input that a function's body does not read from its signature, and leaves the calls as they are.
#
# Versions: onnxslim 0.1.98, onnx 1.23.2, numpy 2.4.6.
# A model-local function f(a, mask, b) = a - b, called as f(x, m, y): legal (full check), and 2 for x = 3, m = 10, y = 1.
# After onnxslim.slim it is f(a, b), still called with three values, which onnx.reference refuses to run (a RuntimeError), as the full check does where types or shapes tell.
# Functions that stand for a fused operator, with an optional operand that this body does not need, are of this form.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxslim==0.1.98 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxslim
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

opset = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
body = helper.make_function("own", "f", ["a", "mask", "b"], ["c"], [helper.make_node("Sub", ["a", "b"], ["c"])], opset[:1])
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "m", "y", "z")]
graph = helper.make_graph([helper.make_node("f", ["x", "m", "y"], ["z"], domain="own")], "g", values[:3], values[3:])
model = helper.make_model(graph, opset_imports=opset, functions=[body], ir_version=10)
onnx.checker.check_model(model, full_check=True)
feeds = {name: np.array([number], np.float32) for name, number in (("x", 3), ("m", 10), ("y", 1))}


def told(name, model):
    inputs, call = list(model.functions[0].input), list(model.graph.node[0].input)
    try:
        onnx.checker.check_model(model, full_check=True)
        result = float(ReferenceEvaluator(model).run(None, feeds)[0][0])
    except Exception as error:
        result = type(error).__name__
    print(f"{name}: f({', '.join(inputs)}) called as f({', '.join(call)}) gives {result}")
    return inputs, len(call), result


before, after = told("before", model), told("after", onnxslim.slim(model))
as_seen = before == (["a", "mask", "b"], 3, 2.0) and after[:2] == (["a", "b"], 3) and isinstance(after[2], str)
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
