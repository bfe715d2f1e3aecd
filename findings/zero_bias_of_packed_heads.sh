#!/usr/bin/env bash
# TensorRT-RTX builds fewer kernels for an FP8 QKV GEMM with a bias of zeros than for the same GEMM without a bias.
#
# Versions: tensorrt-rtx-cu13 1.7.1.116, onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.4.6. No GPU is needed: engines for SM89
# and SM120 are built ahead of time, and the kernels are those of the builder's layer list.
# One packed FP8 GEMM is split into the heads of q, k and v, each of which is quantized for a fused FP8 attention. Where
# a bias is added, the builder makes one kernel of that and all three quantizers; without one it makes more. Zeros as the
# bias change no number and save a kernel: 5 in place of 6 for the attention below, 11 in place of 15 for two with norms.
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

HEADS, WIDTH, TOKENS = 4, 32, 64
HIDDEN = HEADS * WIDTH
E4M3 = ml_dtypes.float8_e4m3fn


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.text = []

    def log(self, severity, message):
        self.text.append(message)


def model(bias):
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
    of_softmax = constant("of_softmax", np.float16(1 / 448))

    def quantized(tensor, by=scale):
        codes = call("QuantizeLinear", [tensor, by, zero], f"{tensor}_codes")
        return call("DequantizeLinear", [codes, by, zero], f"{tensor}_dq")

    def linear(x, name, columns):
        codes = constant(f"{name}_codes", np.random.default_rng(0).standard_normal((HIDDEN, columns)).astype(E4M3))
        weight = call("DequantizeLinear", [codes, scale, zero], f"{name}_weight")
        return call("MatMul", [quantized(x), weight], name)

    packed = linear("x", "packed", 3 * HIDDEN)
    if bias is not None:
        packed = call("Add", [packed, constant("bias", np.full(3 * HIDDEN, bias, np.float16))], "biased")
    shape = constant("shape", np.array([1, TOKENS, 3 * HEADS, WIDTH]))
    heads = call("Transpose", [call("Reshape", [packed, shape], "reshaped")], "heads", perm=[0, 2, 1, 3])
    nodes.append(helper.make_node("Split", [heads, constant("parts", np.array([HEADS] * 3))], ["q", "k", "v"], axis=1))
    query = call("Mul", ["q", constant("factor", np.float16(WIDTH**-0.5))], "scaled")
    key = quantized(call("Transpose", ["k"], "k_t", perm=[0, 1, 3, 2]))
    softmax = call("Softmax", [call("MatMul", [quantized(query), key], "scores")], "probabilities", axis=-1)
    out = call("MatMul", [quantized(softmax, of_softmax), quantized("v")], "mixed")
    flat = constant("flat", np.array([1, TOKENS, HIDDEN]))
    joined = call("Reshape", [call("Transpose", [out], "turned", perm=[0, 2, 1, 3]), flat], "joined")
    linear(joined, "y", HIDDEN)
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, TOKENS, HIDDEN])
    graph = helper.make_graph(nodes, "attention", [value("x")], [value("y")], weights)
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
for name, bias in (("no bias", None), ("zeros", 0.0), ("ones", 1.0)):
    found[name] = [kernels(model(bias), target) for target in (trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)]
    print(f"{name}: {found[name][0]} kernels for SM89, {found[name][1]} for SM120")
as_seen = found["zeros"] == found["ones"] and all(a - b == 1 for a, b in zip(found["no bias"], found["zeros"]))
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
