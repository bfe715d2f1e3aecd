"""Checks of constants: scales and zero points."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.onnx.verify import require, verify_onnx


def failed(model: Any, name: str, *words: str) -> None:
    check = next(c for c in verify_onnx(model.proto) if c.name == name)
    assert not check.passed
    for word in words:
        assert word in check.detail


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_scale_not_positive_and_finite(model: Any, value: float) -> None:
    model.set("x_scale", np.array(value, np.float32))
    failed(model, "scales", "QuantizeLinear 'n_xq' (module 'vit.layers.0.attention.q_proj')", "'x_scale'", "n_xd")


def test_scale_that_is_zero_in_its_own_dtype_only(make_model: Any) -> None:
    model = make_model(dtype=np.float16)
    model.set("w_scale", np.array(1e-8, np.float16))
    failed(model, "scales", "DequantizeLinear 'n_wd'", "float16")
    model = make_model()
    model.set("w_scale", np.array(1e-8, np.float32))
    require(verify_onnx(model.proto))


def test_scale_that_underflows_in_a_cast(make_model: Any) -> None:
    model = make_model(dtype=np.float16)
    model.set("w_scale32", np.array(1e-8, np.float32))
    model.add("Cast", ["w_scale32"], "w_cast", before="xq", to=TensorProto.FLOAT16)
    model.node("wd").input[1] = "w_cast"
    model.proto.graph.initializer.remove(next(t for t in model.proto.graph.initializer if t.name == "w_scale"))
    failed(model, "scales", "'w_cast'", "float16")


def test_scale_from_data_is_not_judged(model: Any) -> None:
    model.add("ReduceMax", ["x"], "amax", before="xq", keepdims=0)
    for output in ("xq", "xd"):
        model.node(output).input[1] = "amax"
    checks = verify_onnx(model.proto)
    assert "1 computed at run time" in next(c.detail for c in checks if c.name == "scales")


def test_per_channel_scale(model: Any) -> None:
    model.set("w_scale", np.full(16, 0.5, np.float32))
    model.node("wd").input[2] = ""
    require(verify_onnx(model.proto))
    model.set("w_scale", np.array([0.5] * 15 + [0], np.float32))
    failed(model, "scales", "1 of 16 values")
    model.set("w_scale", np.full(8, 0.5, np.float32))
    failed(model, "scales", "8 values for the 16 channels of axis 1")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
def test_scale_in_a_small_dtype(model: Any, dtype: type) -> None:
    """Two-level scales: the block scales are themselves codes."""
    model.set("codes", np.array([1, 0], dtype))
    model.set("w_scale", np.array([1, 0], dtype))
    node = model.node("wd")
    node.input[1] = "w_scale"
    check = next(c for c in verify_onnx(model.proto) if c.name == "scales")
    assert not check.passed
    assert np.dtype(dtype).name in check.detail


def test_scale_of_the_probabilities_in_a_function_call(model: Any) -> None:
    model.set("p_scale", np.array(0, np.float32))
    failed(
        model,
        "scales",
        "QuantizeLinear 'p_quantize",  # in the body, with the module path of its call
        "trt::TRT_QuantizedAttention 'n_y' (module 'vit.layers.0.attention'): input 'normalization_quantize_scale'",
    )


def test_scale_in_a_function_attribute(model: Any) -> None:
    model.proto.functions[0].attribute.append("normalization_quantize_scale")
    model.node("y").attribute.append(helper.make_attribute("normalization_quantize_scale", 0.0))
    failed(model, "scales", "attribute 'normalization_quantize_scale'")


def test_no_zero_point_means_uint8(model: Any) -> None:
    for output in ("xq", "xd"):
        model.node(output).input.pop()
    failed(model, "zero_points", "QuantizeLinear 'n_xq'", "quantizes to uint8")


def test_output_dtype_stands_in_for_a_zero_point(model: Any) -> None:
    for output in ("xq", "xd", "wd"):
        model.node(output).input.pop()
    model.node("xq").attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN))
    require(verify_onnx(model.proto))


def test_zero_point_of_another_type_than_the_data(model: Any) -> None:
    model.set("int8_zero", np.array(0, np.int8))
    model.node("wd").input[2] = "int8_zero"
    failed(model, "zero_points", "DequantizeLinear 'n_wd'", "'int8_zero' is INT8, the data FLOAT8E4M3FN")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_zero_point_not_zero(model: Any, dtype: type) -> None:
    model.set("offset", np.array(3, dtype))
    for output in ("xq", "xd"):
        model.node(output).input[2] = "offset"
    failed(model, "zero_points", "QuantizeLinear 'n_xq'", "'offset'", "is not 0")


def test_zero_point_that_is_computed(model: Any) -> None:
    model.add("Cast", ["mask"], "zeros", before="xq", to=TensorProto.FLOAT8E4M3FN)
    model.node("hq").input[2] = "zeros"
    failed(model, "zero_points", "'zeros' is not a constant")


def test_zero_point_of_another_size_than_its_scale(model: Any) -> None:
    model.set("w_scale", np.full(16, 0.5, np.float32))
    failed(model, "zero_points", "has 1 values, its scale 16")


def test_e5m2(model: Any) -> None:
    model.set("e5m2", np.array(0, ml_dtypes.float8_e5m2))
    for output in ("hq", "hd"):
        model.node(output).input[2] = "e5m2"
    failed(model, "zero_points", "FLOAT8E5M2 has no TensorRT kernel", "n_hq")


def test_int8_model_passes(model: Any) -> None:
    model.set("zero8", np.array(0, np.int8))
    for output in ("xq", "xd", "wd", "hq", "hd"):
        model.node(output).input[2] = "zero8"
    model.set("weight", np.ones((16, 16), np.int8))
    function = model.proto.functions[0]
    function.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(0, np.int8)))
    zero = next(t for t in model.proto.graph.initializer if t.name == "zero")
    model.proto.graph.initializer.remove(zero)
    require(verify_onnx(model.proto))
