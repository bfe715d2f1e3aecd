"""Weights become FP8 codes, once, in the layout that their GEMM reads, with no Cast on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import qcompile
from tests.qcompile.onnx import legacy
from tests.qcompile.onnx.legacy import FP8, OLD_NAMES, linear, tensor
from tests.qcompile.onnx.test_repair import operators, repaired, run

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Q, DQ = OLD_NAMES


def stored(model: onnx.ModelProto) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def codes_of(model: onnx.ModelProto) -> Any:
    (weight,) = [array for array in stored(model).values() if array.dtype == FP8 and array.ndim]
    return weight


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    domain = "trt" if op in OLD_NAMES else ""
    return helper.make_node(op, inputs.split(), [output], name=output, domain=domain, **attributes)


def onnx_quantize(weight: Any, scale: Any, axis: int) -> Any:
    """The standard's operator on float32, by onnx.reference."""
    inputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("x", "s")]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, None)
    zero = tensor("z", np.zeros(np.shape(scale), FP8))
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [output], [zero]))
    feeds = {"x": weight.astype(np.float32), "s": np.asarray(scale).astype(np.float32)}
    return ReferenceEvaluator(model).run(None, feeds)[0]


def test_the_weight_is_stored_as_the_gemm_reads_it(tmp_path: Path) -> None:
    model, report = repaired(linear(), tmp_path)
    weight = stored(linear())["weight"]
    assert set(stored(model)) == {"x_scale", "w_scale", "fp8_zero_point", "weight_fp8_transposed"}  # no float copy
    expected = onnx_quantize(weight, np.float32(0.0072), 0).T
    assert codes_of(model).tobytes() == expected.tobytes() and codes_of(model).shape == (40, 24)
    assert report.folded == {
        "weight_fp8_transposed": "weight [24, 40] float32, per tensor, stored as [40, 24]",
    }
    assert report.transposes == 1


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    kind=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    per_channel=st.booleans(),
    exponents=st.lists(st.integers(-12, 10), min_size=6, max_size=6),
    extremes=st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 6e4, 1e-7]), max_size=5),
    seed=st.integers(0, 2**16),
)
def test_codes_equal_the_standards(
    shape: list[int],
    kind: Any,
    per_channel: bool,
    exponents: list[int],
    extremes: list[float],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rng = np.random.default_rng(seed)
    axis = seed % len(shape)
    count = shape[axis] if per_channel else 1
    scale = (rng.uniform(1, 2, count) * 2.0 ** np.array(exponents[:count])).astype(kind)
    weight = (rng.standard_normal(shape) * 30).astype(kind)
    weight.flat[: min(len(extremes), weight.size)] = np.array(extremes[: weight.size]).astype(kind)
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    nodes = [node(Q, "w s", "q", axis=axis - len(shape)), node(DQ, "q s", "d", axis=axis), node("Add", "d x", "y")]
    source = legacy.model(
        nodes, [tensor("w", weight), tensor("s", scale)], {"x": (elem_type, [1])}, {"y": (elem_type, shape)}
    )
    model, report = repaired(source, tmp_path_factory.mktemp("codes"))
    with np.errstate(all="ignore"):
        expected = onnx_quantize(weight, scale if count > 1 else scale[0], axis)
    assert stored(model)["w_fp8"].tobytes() == expected.tobytes()
    assert ("per tensor" in report.folded["w_fp8"]) == (count == 1)
    assert "w" not in stored(model)


@pytest.mark.parametrize("after", [False, True], ids=["in front of Q", "between DQ and GEMM"])
def test_scales_for_each_channel_stay_so(after: bool, tmp_path: Path) -> None:
    """A weight [N, K] with N scales; stored [K, N], they lie on axis 1."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 40)).astype(np.float32)
    scale = rng.uniform(0.004, 0.01, (1, 24) if not after else (24, 1)).astype(np.float32)  # as amax comes, keepdim
    if after:
        nodes = [node(Q, "w s", "q"), node(DQ, "q s", "d"), node("Transpose", "d", "t", perm=[1, 0])]
    else:
        nodes = [node("Transpose", "w", "t0", perm=[1, 0]), node(Q, "t0 s", "q"), node(DQ, "q s", "t")]
    nodes.append(node("MatMul", "x t", "y"))
    source = legacy.model(
        nodes, [tensor("w", weight), tensor("s", scale)], {"x": (FLOAT, ["N", 40])}, {"y": (FLOAT, ["N", 24])}
    )
    model, _ = repaired(source, tmp_path)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    dq = model.graph.node[0]
    assert [helper.get_attribute_value(a) for a in dq.attribute] == [1]
    assert stored(model)[dq.input[1]].shape == (24,) == stored(model)[dq.input[2]].shape
    flat = scale.reshape(24, 1)
    dequantized = legacy.quantize(weight, flat, axis=0).astype(np.float32) * flat
    x = rng.standard_normal((3, 40)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), x @ dequantized.T, rtol=1e-5, atol=1e-5)


def test_a_weight_that_others_read_stays(tmp_path: Path) -> None:
    """Tied weights: one float for the lookup, one set of codes for two quantizers with the same scale."""
    source = linear()
    source.graph.node.extend(
        [
            node(Q, "weight w_scale", "w_q2"),
            node(DQ, "w_q2 w_scale", "w_d2"),
            node("Transpose", "w_d2", "w_t2", perm=[1, 0]),
            node("MatMul", "x_dq w_t2", "y2"),
            node("Gather", "weight ids", "rows"),
            node("MatMul", "y2 rows", "y3"),
        ]
    )
    source.graph.initializer.append(tensor("ids", np.arange(24)))
    source.graph.output.append(helper.make_tensor_value_info("y3", FLOAT, ["N", 40]))
    model, _ = repaired(source, tmp_path)
    assert "weight" in stored(model) and codes_of(model).shape == (40, 24)  # and no second copy of the codes


def test_codes_behind_a_transpose_and_in_bytes(tmp_path: Path) -> None:
    """TensorRT: "Quantized constant ... only allowed before DQ"."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((24, 40)).astype(FP8)
    nodes = [node("Transpose", "w", "t", perm=[1, 0]), node(DQ, "t s", "d"), node("MatMul", "x d", "y")]
    tensors = [tensor("w", codes.view(np.uint8)), tensor("s", np.array([0.5], np.float32))]
    source = legacy.model(nodes, tensors, {"x": (FLOAT, ["N", 40])}, {"y": (FLOAT, ["N", 24])}, opset=17, ir_version=8)
    model, _ = repaired(source, tmp_path)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    assert codes_of(model).tobytes() == codes.T.tobytes()


def cast_linear(inner: int, outer: int, scale: float) -> onnx.ModelProto:
    """A model in type `outer` whose quantizers compute in type `inner`, as older writers have it."""
    kind = helper.tensor_dtype_to_np_dtype(outer)
    weight = np.random.default_rng(0).standard_normal((24, 40)).astype(kind)
    scales = np.array(scale, helper.tensor_dtype_to_np_dtype(inner))
    nodes = [
        node("Cast", "x", "x_c", to=inner),
        node(Q, "x_c s", "x_q"),
        node(DQ, "x_q s", "x_d"),
        node("Cast", "x_d", "x_b", to=outer),
        node("Cast", "w", "w_c", to=inner),
        node(Q, "w_c s", "w_q"),
        node(DQ, "w_q s", "w_d"),
        node("Cast", "w_d", "w_b", to=outer),
        node("Transpose", "w_b", "w_t", perm=[1, 0]),
        node("MatMul", "x_b w_t", "y"),
    ]
    tensors = [tensor("w", weight), tensor("s", scales)]
    return legacy.model(nodes, tensors, {"x": (outer, ["N", 40])}, {"y": (outer, ["N", 24])}, opset=17, ir_version=8)


@pytest.mark.parametrize(("inner", "outer"), [(FLOAT, HALF), (HALF, FLOAT)])
def test_no_cast_between_a_quantizer_and_a_gemm(inner: int, outer: int, tmp_path: Path) -> None:
    source = cast_linear(inner, outer, 0.0131)
    model, report = repaired(source, tmp_path)
    expected = ["Cast", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert sorted(operators(model)) == sorted(expected) and report.casts == 2
    x = np.random.default_rng(1).standard_normal((5, 40)).astype(helper.tensor_dtype_to_np_dtype(outer))
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), legacy.reference(source, x), rtol=5e-3, atol=1e-2)


def test_a_product_that_is_cast_back_is_computed_in_half(tmp_path: Path) -> None:
    """What FP8 attention looks like in older files."""
    nodes = [
        *(node(Q, f"{name} s", f"{name}_q") for name in "ab"),
        *(node(DQ, f"{name}_q s", f"{name}_d") for name in "ab"),
        *(node("Cast", f"{name}_d", f"{name}_c", to=FLOAT) for name in "ab"),
        node("MatMul", "a_c b_c", "m"),
        node("Cast", "m", "h", to=HALF),
        node("Softmax", "h", "y"),
    ]
    shapes = {"a": (HALF, [2, 40, 16]), "b": (HALF, [2, 16, 40])}
    source = legacy.model(nodes, [tensor("s", np.array(0.0131, np.float16))], shapes, {"y": (HALF, [2, 40, 40])})
    model, report = repaired(source, tmp_path)
    assert operators(model) == ["QuantizeLinear"] * 2 + ["DequantizeLinear"] * 2 + ["MatMul", "Softmax"]
    assert report.casts == 3
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for _, shape in shapes.values())
    new = qcompile.onnx_session(tmp_path / "new.onnx").run(None, {"a": a, "b": b})[0]
    np.testing.assert_allclose(new, legacy.reference(source, a, b), atol=4e-3)  # its Softmax is in half


def test_a_scale_that_half_cannot_hold(tmp_path: Path) -> None:
    onnx.save(cast_linear(FLOAT, HALF, 1e-6), tmp_path / "old.onnx")
    with pytest.raises(qcompile.QCompileError, match=r"'x_d'.*Cast to FLOAT16.*1e-06.*compute that layer in float32"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")


def test_a_standard_quantizer_of_a_constant_is_folded(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        node("MatMul", "x d", "y"),
    ]
    weight = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
    tensors = [tensor("w", weight), tensor("s", np.array(0.01, np.float32)), tensor("z", np.zeros((), FP8))]
    source = legacy.model(nodes, tensors, {"x": (FLOAT, ["N", 40])}, {"y": (FLOAT, ["N", 24])})
    model, report = repaired(source, tmp_path)
    assert operators(model) == ["DequantizeLinear", "MatMul"] and list(report.folded) == ["w_fp8"]
    x = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    (expected,) = ReferenceEvaluator(source).run(None, {"x": x})
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), expected, rtol=1e-5, atol=1e-5)
