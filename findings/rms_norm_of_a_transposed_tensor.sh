#!/usr/bin/env bash
# TensorRT-RTX quantizes an RMS norm of a transposed tensor in kernels of their own, by where the norm's weight is.
#
# Versions: tensorrt-rtx-cu13 1.7.1.116, onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.4.6. No GPU is needed: engines for SM89
# and SM120 are built ahead of time, and the kernels are those of the builder's layer list.
# A float16 tensor [1, 64, 8, 8] goes through Transpose, an RMS norm in float32, a Q/DQ pair in FP8 and an FP8 GEMM.
# The weight is multiplied either in float16, behind the Cast, or in float32, in front of it. In front, norm, weight and
# Q are one kernel; behind, the builder multiplies weight and scale into one constant, and the Cast to FP8 is a kernel
# of its own. Without the Transpose both forms are one kernel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import re

import ml_dtypes
import numpy as np
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIDE = 64, 8
E4M3 = ml_dtypes.float8_e4m3fn


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.text = []

    def log(self, severity, message):
        self.text.append(message)


def model(transposed, in_float32):
    nodes, weights = [], []

    def constant(name, array):
        if array.dtype == E4M3:
            weights.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, array.shape, array.tobytes(), raw=True))
        else:
            weights.append(numpy_helper.from_array(array, name))
        return name

    def call(operator, inputs, output, **attributes):
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    scale, zero = constant("scale", np.float16(0.25)), constant("zero", np.zeros((), E4M3))
    random = np.random.default_rng(0)
    norm_weight = random.uniform(0.5, 1.5, CHANNELS)
    codes = constant("codes", random.standard_normal((CHANNELS, CHANNELS)).astype(E4M3))

    x = call("Transpose", ["x"], "moved", perm=[0, 2, 3, 1]) if transposed else "x"
    wide = call("Cast", [x], "wide", to=TensorProto.FLOAT)
    mean = call("ReduceMean", [call("Mul", [wide, wide], "squares"), constant("last", np.array([-1]))], "mean")
    root = call("Sqrt", [call("Add", [mean, constant("epsilon", np.float32(1e-6))], "above")], "root")
    normal = call("Div", [wide, root], "normal")
    if in_float32:
        normal = call("Mul", [normal, constant("weight", norm_weight.astype(np.float32))], "weighted")
    half = call("Cast", [normal], "half", to=TensorProto.FLOAT16)
    if not in_float32:
        half = call("Mul", [half, constant("weight", norm_weight.astype(np.float16))], "weighted")
    quantized = call("DequantizeLinear", [call("QuantizeLinear", [half, scale, zero], "q"), scale, zero], "dq")
    call("MatMul", [quantized, call("DequantizeLinear", [codes, scale, zero], "matrix")], "y")
    shape = [1, CHANNELS, SIDE, SIDE] if transposed else [1, SIDE, SIDE, CHANNELS]
    value = lambda name, dims: helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims)
    graph = helper.make_graph(nodes, "norm", [value("x", shape)], [value("y", [1, SIDE, SIDE, CHANNELS])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


def kernels(file, capability):
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(file)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    assert builder.build_serialized_network(network, config) is not None
    layers = next(text for text in reversed(log.text) if "Layers:\n" in text).partition("Layers:\n")[2]
    kinds = re.findall(r"^Name: .*?, LayerType: ([^,\n]*),", layers, re.MULTILINE)
    return sum(kind not in ("signal", "wait", "shape_call") for kind in kinds)


found = {}
for transposed in (False, True):
    for in_float32 in (False, True):
        targets = (trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)
        found[transposed, in_float32] = [kernels(model(transposed, in_float32), target) for target in targets]
        form = f"{'transposed' if transposed else 'as it is'}, weight in float{32 if in_float32 else 16}"
        print(f"{form}: {found[transposed, in_float32][0]} kernels for SM89, {found[transposed, in_float32][1]} for SM120")
as_it_is = found[False, False] == found[False, True]
as_seen = as_it_is and all(half > wide for half, wide in zip(found[True, False], found[True, True]))
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
