"""Small ONNX files for the engine tests, written with onnx.helper: nothing of qcompile's own lowering is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

FLOATS = {TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
Dims = list[int | str]


class OnnxFile:
    """A graph under construction; `scope` of a node becomes the module path in its metadata."""

    def __init__(self, dtype: int = TensorProto.FLOAT16, opset: int = 21) -> None:
        self.dtype, self.opset = dtype, opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, scope: str = "", domain: str = "", **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [name], name=f"node_{name}", domain=domain, **attributes)
        if scope:
            entry = onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=repr(["", scope, name]))
            node.metadata_props.append(entry)
        self.nodes.append(node)
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def real(self, value: Any) -> str:
        return self.constant(np.asarray(value).astype(FLOATS[self.dtype]))

    def zero(self, kind: str, shape: tuple[int, ...] = ()) -> str:
        return self.constant(np.zeros(shape, ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8))

    def input(self, name: str, shape: Dims) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.dtype, shape))
        return name

    def output(self, name: str, shape: Dims) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, self.dtype, shape))

    def qdq(self, tensor: str, scale: Any = 0.0625, kind: str = "fp8", **attributes: Any) -> str:
        shape = np.shape(scale)
        scale, zero = self.real(scale), self.zero(kind, shape)
        quantized = self.op("QuantizeLinear", tensor, scale, zero, **attributes)
        return self.op("DequantizeLinear", quantized, scale, zero, **attributes)

    def weight(self, rows: int, columns: int, kind: str | None = "fp8") -> str:
        values = self.random.standard_normal((rows, columns)) * 4
        if kind is None:
            return self.real(values / 64)
        data = values.astype(ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8)
        return self.op("DequantizeLinear", self.constant(data), self.real(1 / 64), self.zero(kind))

    def linear(self, x: str, rows: int, columns: int, kind: str | None, scope: str) -> str:
        if kind is not None:
            x = self.qdq(x, kind=kind)
        product = self.op("MatMul", x, self.weight(rows, columns, kind), scope=scope)
        return self.op("Add", product, self.real(np.ones(columns)), scope=scope)

    def attention(
        self, q: str, k: str, v: str, quantized: bool, softmax: bool = True, mask: str = "", scope: str = "attn"
    ) -> str:
        if quantized:
            q, k, v = (self.qdq(t) for t in (q, k, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]), scope=scope)
        if mask:
            scores = self.op("Add", scores, mask, scope=scope)
        weights = self.op("Softmax", scores, axis=-1, scope=scope)
        if quantized and softmax:
            weights = self.qdq(weights, 1 / 448)
        return self.op("MatMul", weights, v, scope=scope)

    def quantized_attention(self, q: str, k: str, v: str, scope: str = "attn", decomposable: bool = True) -> str:
        """TensorRT's operator as a model-local function with a standard body."""
        zero = numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn))
        body = [
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["s"]),
            helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("Constant", [], ["z"], value=zero),
            helper.make_node("QuantizeLinear", ["p", "scale", "z"], ["pq"]),
            helper.make_node("DequantizeLinear", ["pq", "scale", "z"], ["pd"]),
            helper.make_node("MatMul", ["pd", "v"], ["o"]),
        ]
        attributes = {
            "normalization_quantize_to_type": int(TensorProto.FLOAT8E4M3FN),
            "scale": 1.0,
            "is_causal": 0,
            "TRT_decomposable": int(decomposable),
        }
        opsets = [helper.make_opsetid("", self.opset)]
        arguments = ["q", "k", "v", "mask", "scale"]
        self.functions = [
            helper.make_function("trt", "TRT_QuantizedAttention", arguments, ["o"], body, opsets, list(attributes))
        ]
        q, k, v = (self.qdq(t) for t in (q, k, v))
        return self.op(
            "TRT_QuantizedAttention", q, k, v, "", self.real(1 / 448), scope=scope, domain="trt", **attributes
        )

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("trt", 1), helper.make_opsetid("other", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=self.functions)

    def save(self, path: Path, **options: Any) -> Path:
        onnx.save(self.model(), path, **options)
        return path


@pytest.fixture
def new_file() -> Callable[..., OnnxFile]:
    return OnnxFile


@pytest.fixture
def attention_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with one attention over inputs q, k, v [1, 2, S, D]."""

    def make(
        form: str = "decomposed",
        length: int | str = 64,
        head: int = 32,
        dtype: int = TensorProto.FLOAT16,
        **options: Any,
    ) -> Path:
        file = OnnxFile(dtype)
        q, k, v = (file.input(name, [1, 2, length, head]) for name in "qkv")
        attention = file.quantized_attention if form == "operator" else file.attention
        out = attention(q, k, v, **options)
        file.output(out, [1, 2, length, head])
        return file.save(tmp_path / "attention.onnx")

    return make


@pytest.fixture
def linear_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with one linear, `fc`, 64 -> 64, followed by GELU."""

    def make(kind: str | None = "fp8", rows: int | str = 128, dtype: int = TensorProto.FLOAT16, **save: Any) -> Path:
        file = OnnxFile(dtype)
        y = file.linear(file.input("x", [rows, 64]), 64, 64, kind, "fc")
        file.output(file.op("Gelu", y), [rows, 64])
        return file.save(tmp_path / "linear.onnx", **save)

    return make


@pytest.fixture
def block_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with one transformer block of width 64: `layers.0.{q,k,v,o}`, `layers.0.attn`, `layers.0.fc1`, `fc2`."""

    def make(kind: str | None) -> Path:
        file = OnnxFile()
        x = file.input("x", [1, 64, 64])
        y = file.op("LayerNormalization", x, file.real(np.ones(64)), file.real(np.zeros(64)), axis=-1)
        heads = []
        for name in "qkv":
            head = file.linear(y, 64, 64, kind, f"layers.0.{name}")
            head = file.op("Reshape", head, file.constant(np.array([1, 64, 2, 32])))
            heads.append(file.op("Transpose", head, perm=[0, 2, 1, 3]))
        heads[0] = file.op("Mul", heads[0], file.real(32**-0.5))
        a = file.attention(*heads, quantized=kind == "fp8", scope="layers.0.attn")
        a = file.op("Reshape", file.op("Transpose", a, perm=[0, 2, 1, 3]), file.constant(np.array([1, 64, 64])))
        x = file.op("Add", x, file.linear(a, 64, 64, kind, "layers.0.o"))
        y = file.op("LayerNormalization", x, file.real(np.ones(64)), file.real(np.zeros(64)), axis=-1)
        y = file.op("Gelu", file.linear(y, 64, 256, kind, "layers.0.fc1"))
        file.output(file.op("Add", x, file.linear(y, 256, 64, kind, "layers.0.fc2")), [1, 64, 64])
        return file.save(tmp_path / f"block_{kind}.onnx")

    return make
