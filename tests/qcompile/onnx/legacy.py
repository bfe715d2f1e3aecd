"""ONNX files with legacy FP8 quantizers, and their operators for `onnx.reference`: the judge of what they compute."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

FP8 = ml_dtypes.float8_e4m3fn
OLD_NAMES = ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear")
STANDARD_NAMES = ("QuantizeLinear", "DequantizeLinear")


def along(values: Any, rank: int, axis: int) -> Any:
    values = np.asarray(values).astype(np.float32)
    shape = [1] * rank
    if values.size > 1:
        shape[axis] = values.size
    return values.reshape(shape)


def quantize(x: Any, scale: Any, zero_point: Any = None, axis: int = 1) -> Any:
    """saturate(x / scale + zero_point) in float32."""
    zero = np.zeros((), FP8) if zero_point is None else np.asarray(zero_point).view(FP8)
    with np.errstate(all="ignore"):
        real = x.astype(np.float32) / along(scale, x.ndim, axis) + along(zero, x.ndim, axis)
        return np.clip(real, -448, 448).astype(FP8)


def dequantize(codes: Any, scale: Any, zero_point: Any = None, axis: int = 1) -> Any:
    """(codes - zero_point) * scale in float32, in the type of the scale."""
    zero = np.zeros((), FP8) if zero_point is None else np.asarray(zero_point).view(FP8)
    codes = codes.view(FP8).astype(np.float32)
    with np.errstate(all="ignore"):
        real = (codes - along(zero, codes.ndim, axis)) * along(scale, codes.ndim, axis)
        return real.astype(np.asarray(scale).dtype)


def _op(name: str, compute: Any) -> type[OpRun]:
    def run(self: OpRun, x: Any, s: Any, z: Any = None, axis: int = 1, saturate: int = 1, **_: Any) -> tuple[Any]:
        return (np.asarray(compute(x, s, z, 1 if axis is None else axis)),)

    return type(name, (OpRun,), {"op_domain": "trt", "_run": run})


LEGACY_OPS = [
    _op(name, compute)
    for names in (OLD_NAMES, STANDARD_NAMES)
    for name, compute in zip(names, (quantize, dequantize), strict=True)
]


def reference(model: onnx.ModelProto, *feeds: Any) -> Any:
    """The first output of a file with legacy operators."""
    names = [value.name for value in model.graph.input]
    evaluator = ReferenceEvaluator(model, new_ops=LEGACY_OPS)
    return evaluator.run(None, dict(zip(names, feeds, strict=True)))[0]


def tensor(name: str, value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def model(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    *,
    opset: int = 19,
    ir_version: int = 9,
    value_info: dict[str, tuple[int, list[Any]]] | None = None,
) -> onnx.ModelProto:
    def infos(values: dict[str, tuple[int, list[Any]]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, *what) for name, what in values.items()]

    graph = helper.make_graph(nodes, "legacy", infos(inputs), infos(outputs), initializers)
    graph.value_info.extend(infos(value_info or {}))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def linear(
    names: tuple[str, str] = OLD_NAMES, *, dtype: Any = np.float32, opset: int = 19, transposed: bool = True
) -> onnx.ModelProto:
    """x [N, 40] -> Q -> DQ -> MatMul with the transpose of Q/DQ of a weight [24, 40], with the value_info of modelopt:
    codes are uint8, and a shape is wrong."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    q, dq = names
    zero = ["zero"] if names == STANDARD_NAMES else []
    weight = rng.standard_normal((24, 40) if transposed else (40, 24)).astype(dtype)
    nodes = [
        helper.make_node(q, ["x", "x_scale", *zero], ["x_q"], name="x_quantize", domain="trt"),
        helper.make_node(dq, ["x_q", "x_scale"], ["x_dq"], name="x_dequantize", domain="trt"),
        helper.make_node(q, ["weight", "w_scale", *zero], ["w_q"], name="w_quantize", domain="trt"),
        helper.make_node(dq, ["w_q", "w_scale"], ["w_dq"], name="w_dequantize", domain="trt"),
    ]
    if transposed:
        nodes.append(helper.make_node("Transpose", ["w_dq"], ["w_t"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x_dq", "w_t" if transposed else "w_dq"], ["y"], name="gemm"))
    constants = {"x_scale": np.array(0.0131, dtype), "w_scale": np.array(0.0072, dtype), "weight": weight}
    return model(
        nodes,
        [*(tensor(name, value) for name, value in constants.items()), tensor("zero", np.zeros(1, FP8))],
        {"x": (kind, ["N", 40])},
        {"y": (kind, ["N", 24])},
        opset=opset,
        ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", opset)]),
        value_info={"x_q": (onnx.TensorProto.UINT8, ["N", 40]), "w_t": (kind, [])},
    )
