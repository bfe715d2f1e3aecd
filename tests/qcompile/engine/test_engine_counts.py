"""What the report counts, judged on engines that the real builder made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qcompile.engine import AttentionCount, EngineReport, build_engine

pytest.importorskip("tensorrt_rtx")

TARGETS = ("sm89", "sm120")


def build(path: Path, target: str = "sm89", **options: Any) -> EngineReport:
    return build_engine(path, target=target, progress=False, **options)


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {precision: count for precision, count in counts.items() if count}


def lengths(*sizes: int) -> dict[str, Any]:
    return {name: tuple((1, 2, size, 32) for size in sizes) for name in "qkv"}


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_block_is_all_low_precision(block_file: Callable[..., Path], target: str) -> None:
    report = build(block_file("fp8"), target)
    assert report.attention == AttentionCount(total=1, fused=1, fp8=1)
    # q, k and v are one GEMM on SM89 and three on SM120
    assert nonzero(report.gemms) == {"fp8": {"sm89": 4, "sm120": 6}[target]}
    assert report.not_low_precision == []
    assert report.kernels == sum(layer.is_kernel for layer in report.layers) > 9


@pytest.mark.parametrize("target", TARGETS)
def test_half_block_names_every_module(block_file: Callable[..., Path], target: str) -> None:
    report = build(block_file(None), target)
    assert report.attention == AttentionCount(total=1, fused=1, fp8=0)
    assert nonzero(report.gemms) == {"half": 4}
    assert {(kind, module) for kind, module, _ in report.not_low_precision} == {
        ("attention", "layers.0.attn"),
        *(("gemm", f"layers.0.{name}") for name in ("q", "k", "v", "o", "fc1", "fc2")),
    }
    assert all("not quantized in the file" in entry.reason for entry in report.not_low_precision)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("fp8", TensorProto.FLOAT16, "fp8"),
        ("fp8", TensorProto.BFLOAT16, "fp8"),
        ("fp8", TensorProto.FLOAT, "fp8"),
        ("int8", TensorProto.FLOAT16, "int8"),
        (None, TensorProto.FLOAT16, "half"),
        (None, TensorProto.BFLOAT16, "half"),
        (None, TensorProto.FLOAT, "float"),
    ],
)
def test_gemm_precision(linear_file: Callable[..., Path], kind: str | None, dtype: int, expected: str) -> None:
    report = build(linear_file(kind, dtype=dtype))
    assert nonzero(report.gemms) == {expected: 1}
    assert [entry.module for entry in report.not_low_precision] == ([] if kind else ["fc"])


def test_half_quantized_gemms_say_what_is_missing(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.input("x", [128, 64])
    weight_only = file.op("MatMul", x, file.weight(64, 64), scope="weight_only")
    activation_only = file.op("MatMul", file.qdq(weight_only), file.weight(64, 64, None), scope="activation_only")
    per_axis = file.qdq(activation_only, np.full(64, 0.0625), axis=1)
    file.output(file.op("MatMul", per_axis, file.weight(64, 64), scope="per_axis"), [128, 64])
    report = build(file.save(tmp_path / "m.onnx"))
    assert nonzero(report.gemms) == {"half": 3}
    reasons = {entry.module: entry.reason for entry in report.not_low_precision}
    assert reasons["weight_only"].endswith("activation not quantized in the file")
    assert reasons["activation_only"].endswith("weight not quantized in the file")
    assert "the builder does not multiply this form" in reasons["per_axis"]


def test_matrix_vector_product_in_a_pointwise_kernel_is_named(linear_file: Callable[..., Path]) -> None:
    report = build(linear_file(None, rows=1))
    assert nonzero(report.gemms) == {}
    assert [entry.module for entry in report.not_low_precision] == ["fc"]
    assert "pointwise kernel" in report.not_low_precision[0].reason


def test_convolutions(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.input("x", [1, 3, 32, 32])
    x = file.op("Conv", x, file.real(np.ones((64, 3, 8, 8)) / 192), strides=[8, 8], scope="patch")
    x = file.op("Relu", x)
    weight = file.qdq(file.real(np.ones((64, 64, 3, 3)) / 64), 0.001)
    file.output(file.op("Conv", file.qdq(x), weight, pads=[1, 1, 1, 1], scope="conv"), [1, 64, 4, 4])
    report = build(file.save(tmp_path / "m.onnx"))
    assert nonzero(report.convolutions) == {"fp8": 1, "half": 1}
    assert [(entry.kind, entry.module) for entry in report.not_low_precision] == [("conv", "patch")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["decomposed", "operator"])
def test_fp8_attention(attention_file: Callable[..., Path], form: str, target: str) -> None:
    options = {} if form == "operator" else {"quantized": True}
    report = build(attention_file(form, **options), target)
    assert report.attention == AttentionCount(total=1, fused=1, fp8=1)
    assert report.not_low_precision == []


def test_masked_fp8_attention(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    q, k, v = (file.input(name, [1, 2, 64, 32]) for name in "qkv")
    out = file.attention(q, k, v, quantized=True, mask=file.input("mask", [1, 1, 1, 64]))
    file.output(out, [1, 2, 64, 32])
    assert build(file.save(tmp_path / "m.onnx")).attention.fp8 == 1


@pytest.mark.parametrize(
    ("options", "count", "reason"),
    [
        ({"quantized": True, "softmax": False}, (1, 0), "softmax output not quantized"),
        ({"quantized": True, "head": 512}, (1, 0), "head dimension 512"),
        ({"quantized": True, "length": 16}, (1, 0), "as short as 16"),
        ({"quantized": True, "dtype": TensorProto.FLOAT}, (1, 0), "unless what reads its output next is a quantizer"),
        ({"quantized": False}, (1, 1), "fused in half: not quantized"),
        ({"quantized": False, "dtype": TensorProto.BFLOAT16}, (1, 1), "fused in half: not quantized"),
        ({"quantized": False, "dtype": TensorProto.FLOAT}, (1, 0), "not fused: not quantized"),
    ],
)
def test_other_attention(
    attention_file: Callable[..., Path], options: dict[str, Any], count: tuple[int, int], reason: str
) -> None:
    report = build(attention_file(**options))
    assert report.attention == AttentionCount(total=count[0], fused=count[1])
    # the two GEMMs of an unfused attention are part of it
    assert nonzero(report.gemms) == {}
    [(kind, module, found)] = report.not_low_precision
    assert (kind, module) == ("attention", "attn")
    assert reason in found


def test_decode_attention_runs_in_the_gemv_kernel(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    q, k, v = file.input("q", [1, 8, 1, 64]), file.input("k", [1, 8, 512, 64]), file.input("v", [1, 8, 512, 64])
    file.output(file.attention(q, k, v, quantized=False), [1, 8, 1, 64])
    report = build(file.save(tmp_path / "m.onnx"))
    assert report.attention == AttentionCount(total=1, fused=1, fp8=0)
    assert any("gemv_mha" in layer.tactic for layer in report.layers)


def test_a_classifiers_softmax_is_no_attention(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    logits = file.linear(file.input("x", [8, 64]), 64, 16, None, "head")
    weights = file.op("Softmax", logits, axis=-1)
    file.output(file.op("MatMul", weights, file.weight(16, 64, None), scope="experts"), [8, 64])
    report = build(file.save(tmp_path / "m.onnx"))
    assert report.attention.total == 0
    assert {entry.module for entry in report.not_low_precision} == {"head", "experts"}


@pytest.mark.parametrize("form", ["decomposed", "operator"])
@pytest.mark.parametrize(("low", "fused"), [(1, 0), (16, 0), (31, 0), (32, 1)])
def test_smallest_profile_decides_on_fp8_attention(
    attention_file: Callable[..., Path], form: str, low: int, fused: int
) -> None:
    options = {} if form == "operator" else {"quantized": True}
    path = attention_file(form, length="s", **options)
    report = build(path, profiles=lengths(low, 64, 128))
    assert report.attention.fp8 == fused
    if fused:
        assert report.notices == []
    else:
        assert f"as short as {low}" in report.not_low_precision[0].reason
        assert "raise the profile's minimum to 32" in report.notices[0]
        assert "attn" in report.notices[0]


@pytest.mark.slow
def test_several_profiles_report_the_worst(attention_file: Callable[..., Path]) -> None:
    path = attention_file(length="s", quantized=True)
    good, bad = lengths(32, 64, 128), lengths(1, 8, 16)
    one = build(path, profiles=bad)
    for profiles in ([good, bad], [bad, good]):
        report = build(path, profiles=profiles)
        assert (report.attention.fp8, report.kernels) == (0, one.kernels)
        assert f"those of profile {profiles.index(bad)}" in report.notices[0]
        assert {layer.profile for layer in report.layers} == {0, 1}


def test_nvfp4_gemm(new_file: Any, tmp_path: Path) -> None:
    file = new_file(opset=23)
    x, scale = file.input("x", [128, 64]), file.real(1 / 64)
    node = onnx.helper.make_node(
        "TRT_FP4DynamicQuantize", [x, scale], ["data", "scales"], domain="trt", axis=-1, block_size=16, scale_type=17
    )
    file.nodes.append(node)
    activation = file.op(
        "DequantizeLinear", "data", file.op("DequantizeLinear", "scales", scale), axis=-1, block_size=16
    )
    codes = bytes(file.random.integers(0, 256, 64 * 64 // 2, dtype=np.uint8))
    file.initializers.append(onnx.helper.make_tensor("w", TensorProto.FLOAT4E2M1, [64, 64], codes, raw=True))
    weight_scales = file.op("DequantizeLinear", file.constant(np.ones((4, 64), ml_dtypes.float8_e4m3fn)), scale)
    weight = file.op("DequantizeLinear", "w", weight_scales, axis=0, block_size=16)
    file.output(file.op("MatMul", activation, weight, scope="fc"), [128, 64])
    report = build(file.save(tmp_path / "m.onnx"), "sm120", expect={"gemm_fp4": 1})
    assert nonzero(report.gemms) == {"fp4": 1}
    assert report.not_low_precision == []
