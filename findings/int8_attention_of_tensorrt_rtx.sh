#!/usr/bin/env bash
# TensorRT-RTX fuses INT8 attention only with Q/DQ on the probabilities, a Q behind it, and up to 512 keys.
#
# Versions: tensorrt-rtx-cu13 1.7.1.116, onnx 1.23.2, numpy 2.4.6. No GPU is needed: engines for SM89 are built ahead of
# time, and the kernels are those of the builder's layer list.
# One attention over INT8 q, k and v, four heads, in float16 and in float32. It is one kernel that reads and writes INT8
# for heads of 16, 32 and 64 and up to 512 keys. With 513 keys, heads of 48 or 128, no quantizer on the probabilities, or
# an output that is not quantized at once, it is two GEMMs and a softmax with quantizers between them: more kernels than
# the same attention left in float16. Nothing is said of it. (FP8 is taken with any number of keys from 32 on.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

HEADS = 4


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.text = []

    def log(self, severity, message):
        self.text.append(message)


def model(keys, width, dtype=np.float16, softmax=True, output=True):
    """Queries, keys and values as inputs; `softmax`: Q/DQ on the probabilities; `output`: and on what is made."""
    nodes, weights = [], []

    def constant(name, array):
        weights.append(numpy_helper.from_array(array, name))
        return name

    def call(operator, inputs, name, **attributes):
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    zero = constant("zero", np.int8(0))
    scale, of_softmax = constant("scale", dtype(0.02)), constant("of_softmax", dtype(1 / 127))

    def quantized(tensor, by=scale):
        return call("DequantizeLinear", [call("QuantizeLinear", [tensor, by, zero], f"{tensor}_q"), by, zero], f"{tensor}_dq")

    k = quantized(call("Transpose", ["k"], "k_t", perm=[0, 1, 3, 2]))
    probabilities = call("Softmax", [call("MatMul", [quantized("q"), k], "scores")], "probabilities", axis=-1)
    if softmax:
        probabilities = quantized(probabilities, of_softmax)
    mixed = call("MatMul", [probabilities, quantized("v")], "mixed")
    call("Identity", [quantized(mixed) if output else mixed], "y")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sizes = {"q": 64, "k": keys, "v": keys}
    inputs = [helper.make_tensor_value_info(name, kind, [1, HEADS, size, width]) for name, size in sizes.items()]
    result = helper.make_tensor_value_info("y", kind, [1, HEADS, 64, width])
    graph = helper.make_graph(nodes, "attention", inputs, [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


def is_fused(file):
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(file)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    layers = next(text for text in reversed(log.text) if "Layers:\n" in text).partition("Layers:\n")[2]
    attentions = [line for line in layers.splitlines() if line.startswith("Name: _gemm_mha")]
    return bool(attentions) and attentions[0].count("Datatype: Int8") >= 4


cases = {
    "64 keys, heads of 16": (model(64, 16), True),
    "64 keys, heads of 32": (model(64, 32), True),
    "512 keys, heads of 64": (model(512, 64), True),
    "512 keys, heads of 64, float32": (model(512, 64, np.float32), True),
    "513 keys, heads of 64": (model(513, 64), False),
    "64 keys, heads of 48": (model(64, 48), False),
    "64 keys, heads of 128": (model(64, 128), False),
    "probabilities not quantized": (model(64, 64, softmax=False), False),
    "output not quantized": (model(64, 64, output=False), False),
}
as_seen = True
for name, (file, expected) in cases.items():
    found = is_fused(file)
    as_seen &= found == expected
    print(f"{name}: {'one INT8 kernel' if found else 'not fused'}")
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
