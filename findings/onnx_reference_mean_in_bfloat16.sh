#!/usr/bin/env bash
# onnx.reference's ReduceMean and ReduceSum of bfloat16 stand still: the mean of a thousand ones is 0.26.
#
# Versions: onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.4.6, opset 21.
# The sum is carried in bfloat16 with its 8 binary digits, one element at a time: from 256 on adding 1 changes nothing. numpy's own
# float16 adds in pairs, and is right. ONNX Runtime's CPU provider has no ReduceMean for bfloat16, so that the reference is the
# only judge of such a file, and a normalization or a pooling in it looks wrong by a factor.
# What helps: an operator of one's own (ReferenceEvaluator(new_ops=...)) that sums in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

TYPES = {ml_dtypes.bfloat16: TensorProto.BFLOAT16, np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT}


def reduced(operator, kind, count):
    """`operator` of `count` ones."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "axes"], ["y"], keepdims=0)], "reduction",
        [helper.make_tensor_value_info("x", TYPES[kind], [1, count])], [helper.make_tensor_value_info("y", TYPES[kind], [1])],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return float(ReferenceEvaluator(model).run(None, {"x": np.ones((1, count), kind)})[0][0])


changed = False
for kind in TYPES:
    for count in (100, 256, 1000):
        total, mean = (reduced(operator, kind, count) for operator in ("ReduceSum", "ReduceMean"))
        print(f"{np.dtype(kind).name:8} of {count} ones: sum {total}, mean {mean}")
        still = kind is ml_dtypes.bfloat16 and count > 256
        changed |= total != (256 if still else count) or (mean < 0.3) != still
raise SystemExit("this has changed" if changed else 0)
PYTHON
