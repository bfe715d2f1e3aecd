"""One small model that passes every check, for tests that break one thing in it."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompile.onnx.names import NAME_SCOPES

PATH = "vit.layers.0.attention.q_proj"


def node(op_type: str, inputs: list[str], output: str, path: str = PATH, **attributes: object) -> onnx.NodeProto:
    made = helper.make_node(op_type, inputs, [output], name=f"n_{output}", **attributes)
    made.metadata_props.add(key=NAME_SCOPES, value=repr(["", "vit", path, f"fx_{output}"]))
    return made


def fp8(value: float = 0.0, name: str = "zero") -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, ml_dtypes.float8_e4m3fn), name)


def attention_function(opset: int) -> onnx.FunctionProto:
    """softmax(q k^T) v with quantized probabilities, as TensorRT's builtin of that name computes it."""
    body = [
        helper.make_node("Constant", [], ["zero"], value=fp8()),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], name="qk"),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "normalization_quantize_scale", "zero"], ["pq"], name="p_quantize"),
        helper.make_node("DequantizeLinear", ["pq", "normalization_quantize_scale", "zero"], ["pd"]),
        helper.make_node("MatMul", ["pd", "v"], ["o"]),
    ]
    inputs = ["q", "k", "v", "mask", "normalization_quantize_scale"]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function("trt", "TRT_QuantizedAttention", inputs, ["o"], body, imports)


def build(
    *, opset: int = 21, ir_version: int = 10, dtype: type = np.float32, tokens: int | str = "N"
) -> onnx.ModelProto:
    """x [tokens, 32, 16] -> FP8 linear -> quantized attention over itself -> y, and a mask added to the linear."""
    rng = np.random.default_rng(0)
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = (rng.standard_normal((16, 16)) * 50).astype(ml_dtypes.float8_e4m3fn)
    values = {
        "x_scale": np.array(2**-5, dtype),
        "w_scale": np.array(2**-8, dtype),
        "h_scale": np.array(2**-4, dtype),
        "p_scale": np.array(1 / 448, dtype),
        "bias": rng.standard_normal(16).astype(dtype),
        "weight": weight,
    }
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "zero"], "xq"),
        node("DequantizeLinear", ["xq", "x_scale", "zero"], "xd"),
        node("DequantizeLinear", ["weight", "w_scale", "zero"], "wd"),
        node("MatMul", ["xd", "wd"], "xw"),
        node("Add", ["xw", "bias"], "h0"),
        node("Add", ["h0", "mask"], "h"),
        node("QuantizeLinear", ["h", "h_scale", "zero"], "hq"),
        node("DequantizeLinear", ["hq", "h_scale", "zero"], "hd"),
        node("TRT_QuantizedAttention", ["hd", "hd", "hd", "", "p_scale"], "y", "vit.layers.0.attention", domain="trt"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", elem_type, [tokens, 32, 16]),
            helper.make_tensor_value_info("mask", elem_type, [tokens, 32, 1]),
        ],
        [helper.make_tensor_value_info("y", elem_type, [tokens, 32, 16])],
        [fp8(), *(numpy_helper.from_array(value, name) for name, value in values.items())],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    functions = [attention_function(opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=functions)


class Model:
    """A model and the edits that tests make to it."""

    def __init__(self, **options: object) -> None:
        self.proto = build(**options)  # type: ignore[arg-type]

    def node(self, output: str) -> onnx.NodeProto:
        return next(n for n in self.proto.graph.node if output in n.output)

    def set(self, name: str, value: np.ndarray) -> None:
        """Replace initializer `name`, or add it."""
        kept = [tensor for tensor in self.proto.graph.initializer if tensor.name != name]
        del self.proto.graph.initializer[:]
        self.proto.graph.initializer.extend([*kept, numpy_helper.from_array(value, name)])

    def insert(self, before: str, *nodes: onnx.NodeProto) -> None:
        at = next(i for i, n in enumerate(self.proto.graph.node) if before in n.output)
        kept = list(self.proto.graph.node)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend([*kept[:at], *nodes, *kept[at:]])

    def add(self, op_type: str, inputs: list[str], output: str, before: str, **attributes: object) -> None:
        self.insert(before, node(op_type, inputs, output, **attributes))


@pytest.fixture
def make_model() -> Callable[..., Model]:
    return Model


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal((2, 32, 16)).astype(np.float32) * 8,
        "mask": rng.standard_normal((2, 32, 1)).astype(np.float32),
    }
