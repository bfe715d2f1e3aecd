"""Files with legacy FP8 operators become files of standard operators that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

import qcompile
from qcompile.errors import RepairError
from qcompile.onnx import save as save_module
from tests.qcompile.onnx import legacy
from tests.qcompile.onnx.conftest import build
from tests.qcompile.onnx.legacy import FP8, OLD_NAMES, STANDARD_NAMES, linear, tensor


def repaired(source: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, qcompile.RepairReport]:
    """The repaired file, having passed the judges that every file has to pass."""
    onnx.save(source, folder / "old.onnx")
    report = qcompile.repair_onnx(folder / "old.onnx", folder / "new.onnx")
    onnx.checker.check_model(str(folder / "new.onnx"), full_check=True)
    return onnx.load(folder / "new.onnx"), report


def operators(model: onnx.ModelProto) -> list[str]:
    return [f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node]


def run(path: Path, x: Any) -> Any:
    session = qcompile.onnx_session(path)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [13, 17, 19, 21])
@pytest.mark.parametrize("names", [OLD_NAMES, STANDARD_NAMES])
def test_legacy_quantizers_become_standard(names: tuple[str, str], opset: int, dtype: Any, tmp_path: Path) -> None:
    source = linear(names, opset=opset, dtype=dtype)
    model, report = repaired(source, tmp_path)
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", max(opset, 19))]
    assert model.ir_version == {19: 9, 21: 10}[max(opset, 19)]
    assert report.changed and report.opset == (opset, max(opset, 19))
    assert report.standardized == {f"trt::{name}": 2 for name in names} and report.shapes == 3
    x = np.random.default_rng(1).standard_normal((5, 40)).astype(dtype)
    bound = 1e-6 if dtype == np.float32 else 1e-3
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), legacy.reference(source, x), rtol=bound, atol=4 * bound)
    np.testing.assert_allclose(
        ReferenceEvaluator(model).run(None, {"x": x})[0], legacy.reference(source, x), rtol=0.05, atol=0.3
    )  # it divides in half precision, which moves a few codes


def test_every_quantizer_has_a_shape_without_value_info(tmp_path: Path) -> None:
    model, _ = repaired(linear(STANDARD_NAMES), tmp_path)
    said = {value.name: value for value in model.graph.value_info}
    del model.graph.value_info[:]
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {value.name: value for value in inferred.graph.value_info}
    for node in model.graph.node[:3]:
        assert found[node.output[0]] == said[node.output[0]]  # what the file says is what is true
        assert len(found[node.output[0]].type.tensor_type.shape.dim) == 2
    assert found["x_q"].type.tensor_type.elem_type == TensorProto.FLOAT8E4M3FN


def test_shapes_that_the_graph_computes_are_constants(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["dims"]),
        helper.make_node("Slice", ["dims", "from", "to"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["flat"]),
        helper.make_node(OLD_NAMES[0], ["flat", "scale"], ["q"], domain="trt"),
        helper.make_node(OLD_NAMES[1], ["q", "scale"], ["y"], domain="trt"),
    ]
    constants = {"from": np.array([0]), "to": np.array([1]), "rest": np.array([-1]), "scale": np.array(0.5, np.float32)}
    tensors = [tensor(name, value) for name, value in constants.items()]
    source = legacy.model(nodes, tensors, {"x": (1, [2, 3, 4])}, {"y": (1, [2, 12])}, opset=17, ir_version=8)
    model, _ = repaired(source, tmp_path)
    assert operators(model) == ["Reshape", "QuantizeLinear", "DequantizeLinear"]
    x = np.ones((2, 3, 4), np.float32)
    assert np.array_equal(run(tmp_path / "new.onnx", x), x.reshape(2, 12))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([np.float32, np.float16]),
    per_channel=st.booleans(),
    zeros=st.lists(st.integers(0, 255).filter(lambda byte: byte & 0x7F != 0x7F), min_size=5, max_size=5),
    exponents=st.lists(st.integers(-12, 6), min_size=5, max_size=5),
    extremes=st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 6e4, -6e4, 1e-7]), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_zero_points_follow_the_formula(
    shape: list[int],
    dtype: Any,
    per_channel: bool,
    zeros: list[int],
    exponents: list[int],
    extremes: list[float],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """saturate(x / s + z) and (q - z) * s for any zero point, bit by bit, whatever x holds; zero points as uint8."""
    axis = seed % len(shape)
    count = shape[axis] if per_channel else 1
    rng = np.random.default_rng(seed)
    scale = (rng.uniform(1, 2, count) * 2.0 ** np.array(exponents[:count])).astype(dtype)
    zero = np.array(zeros[:count], np.uint8)
    x = (rng.standard_normal(shape) * 30).astype(dtype)
    x.flat[: min(len(extremes), x.size)] = extremes[: x.size]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node(OLD_NAMES[0], ["x", "s", "z"], ["q"], name="q", domain="trt", axis=axis),
        helper.make_node(OLD_NAMES[1], ["q", "s", "z"], ["y"], name="dq", domain="trt", axis=axis),
    ]
    source = legacy.model(nodes, [tensor("s", scale), tensor("z", zero)], {"x": (kind, shape)}, {"y": (kind, shape)})
    folder = tmp_path_factory.mktemp("zero")
    model, report = repaired(source, folder)
    assert [value.name for value in model.graph.output] == ["y"]
    assert len(report.zero_points) == (2 if (zero & 0x7F).any() else 0)
    assert np.array_equal(run(folder / "new.onnx", x), legacy.reference(source, x), equal_nan=True)
    if report.zero_points:  # all in float32, so that it rounds in the same places
        with np.errstate(all="ignore"):
            (again,) = ReferenceEvaluator(model).run(None, {"x": x})
        assert np.array_equal(again, legacy.reference(source, x), equal_nan=True)


def test_a_scale_of_another_type_rounds_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(OLD_NAMES[0], ["x", "s"], ["q"], name="q", domain="trt"),
        helper.make_node(OLD_NAMES[1], ["q", "s"], ["y"], name="dq", domain="trt"),
    ]
    scale = tensor("s", np.array(0.0131, np.float32))
    source = legacy.model(nodes, [scale], {"x": (TensorProto.FLOAT16, [64])}, {"y": (TensorProto.FLOAT, [64])})
    model, _ = repaired(source, tmp_path)
    assert operators(model) == ["Cast", "QuantizeLinear", "DequantizeLinear"]
    x = np.random.default_rng(0).standard_normal(64).astype(np.float16)
    assert np.array_equal(run(tmp_path / "new.onnx", x), legacy.reference(source, x))


def test_integer_quantizers_beside_fp8_lose_their_zero_points(tmp_path: Path) -> None:
    """Zero points along the reduced axis, which no bias can hold, among them."""
    source = linear(STANDARD_NAMES, transposed=False)
    int8 = [
        helper.make_node("QuantizeLinear", ["y", "s", "z"], ["i_q"], name="i_q", doc_string="mine"),
        helper.make_node("DequantizeLinear", ["i_q", "s", "z"], ["i_dq"], name="i_dq"),
        helper.make_node("QuantizeLinear", ["v", "vs", "vz"], ["v_q"], name="v_q", axis=0),
        helper.make_node("DequantizeLinear", ["v_q", "vs", "vz"], ["v_dq"], name="v_dq", axis=0),
        helper.make_node("MatMul", ["i_dq", "v_dq"], ["out"]),
    ]
    rng = np.random.default_rng(0)
    source.graph.node.extend(int8)
    source.graph.initializer.extend(
        [
            tensor("s", np.array(0.5, np.float32)),
            tensor("z", np.array(7, np.uint8)),
            tensor("v", rng.standard_normal((24, 8)).astype(np.float32)),
            tensor("vs", rng.uniform(0.01, 0.1, 24).astype(np.float32)),
            tensor("vz", np.arange(24, dtype=np.int8)),
        ]
    )
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 8]))
    model, report = repaired(source, tmp_path)
    assert not nonzero(model) and len(report.offsets) == 4 and report.signed == 1
    assert all(check.passed for check in report.checks)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), legacy.reference(source, x), rtol=1e-5, atol=1e-5)


def nonzero(model: onnx.ModelProto) -> list[str]:
    """The zero points of Q and DQ that are not 0."""
    values = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer}
    points = {name for node in model.graph.node if "Quantize" in node.op_type for name in node.input[2:]}
    return sorted(name for name in points if values[name].any())


@pytest.mark.parametrize("domain", ["trt", "com.microsoft"])
@pytest.mark.parametrize(("dtype", "zero"), [(np.int8, -3), (np.uint8, 125), (np.uint8, None)])
def test_integer_quantizers_in_other_domains(domain: str, dtype: Any, zero: int | None, tmp_path: Path) -> None:
    point = [] if zero is None else ["z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", *point], ["q"], name="q", domain=domain),
        helper.make_node("DequantizeLinear", ["q", "s", *point], ["y"], name="dq", domain=domain),
    ]
    tensors = [tensor("s", np.array(0.5, np.float32)), tensor("z", np.array(zero or 0, dtype))]
    source = legacy.model(nodes, tensors[: 1 + len(point)], {"x": (1, [4])}, {"y": (1, [4])})
    if domain == "trt" and zero is None:
        with pytest.raises(RepairError, match="give it a zero point of its type"):
            repaired(source, tmp_path)
        return
    model, _ = repaired(source, tmp_path)
    assert not nonzero(model) and {node.domain for node in model.graph.node} == {""}
    low, high = ((0, 255) if dtype is np.uint8 else (-128, 127)) - np.array(zero or 0)
    expected = [0, max(1, low / 2), max(-1, low / 2), high / 2]
    assert run(tmp_path / "new.onnx", np.array([0, 1, -1, 1e3], np.float32)).tolist() == expected


def test_operators_that_only_tensorrt_reads_are_kept(tmp_path: Path) -> None:
    source = linear(OLD_NAMES)
    plugin = helper.make_node("MyAttention", ["y"], ["z"], name="attention", domain="trt", heads=2)
    after = [
        helper.make_node(OLD_NAMES[0], ["z", "x_scale"], ["z_q"], name="z_quantize", domain="trt"),
        helper.make_node(OLD_NAMES[1], ["z_q", "x_scale"], ["z_dq"], name="z_dequantize", domain="trt"),
    ]
    source.graph.node.extend([plugin, *after])
    source.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 24]))
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("z_dq", TensorProto.FLOAT, ["N", 24]))
    model, report = repaired(source, tmp_path)
    assert plugin in model.graph.node and ("trt", 1) in [(o.domain, o.version) for o in model.opset_import]
    assert report.kept == {"trt::MyAttention": 1} and "only TensorRT reads" in report.notices[0]
    assert report.shapes == 5  # by what the file says of the plugin's output
    assert {node.domain for node in model.graph.node} == {"", "trt"} and all(check.passed for check in report.checks)


@pytest.mark.parametrize("external", [False, True])
def test_a_standard_file_comes_out_equal(tmp_path: Path, external: bool) -> None:
    options = {"save_as_external_data": True, "location": "weights", "size_threshold": 16} if external else {}
    onnx.save(build(), tmp_path / "old.onnx", **options)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert not report.changed and not report.standardized and report.opset == (21, 21)
    written = onnx.load(tmp_path / "new.onnx")
    del written.graph.value_info[:]  # onnx-ir writes the types of initializers there
    assert written == build()
    if not external:
        assert (tmp_path / "new.onnx").read_bytes() == (tmp_path / "old.onnx").read_bytes()
    again = qcompile.repair_onnx(tmp_path / "new.onnx", tmp_path / "again.onnx")
    assert not again.changed


def test_what_a_standard_file_says_wrong_is_mended(tmp_path: Path) -> None:
    source = build()
    source.graph.value_info.append(helper.make_tensor_value_info("xq", TensorProto.UINT8, [1]))
    source.graph.initializer.append(tensor("forgotten", np.zeros(400, np.float32)))
    model, report = repaired(source, tmp_path)
    assert report.changed and not report.standardized
    assert list(model.graph.node) == list(source.graph.node)
    assert "forgotten" not in [t.name for t in model.graph.initializer]


def test_a_repaired_file_is_standard(tmp_path: Path) -> None:
    repaired(linear(OLD_NAMES, opset=17), tmp_path)
    report = qcompile.repair_onnx(tmp_path / "new.onnx", tmp_path / "again.onnx")
    assert not report.changed and (tmp_path / "again.onnx").read_bytes() == (tmp_path / "new.onnx").read_bytes()


@pytest.mark.parametrize("limit", [0, 10**9])
def test_external_data_goes_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", limit)
    source = linear(OLD_NAMES, opset=17)
    plain, _ = repaired(source, tmp_path)
    (tmp_path / "in").mkdir()
    onnx.save(source, tmp_path / "in/old.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = {file: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    report = qcompile.repair_onnx(tmp_path / "in/old.onnx", tmp_path / "out/new.onnx")
    assert {file: file.read_bytes() for file in (tmp_path / "in").iterdir()} == before
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == ({"new.onnx"} if limit else {"new.onnx", *save_module._locations(tmp_path / "out/new.onnx")})
    assert report.bytes[1] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert onnx.load(tmp_path / "out/new.onnx").graph == plain.graph


def test_quantizers_in_functions_and_branches(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 19), helper.make_opsetid("trt", 1)]
    fake = [
        helper.make_node("Constant", [], ["s"], value_float=0.25),
        helper.make_node(OLD_NAMES[0], ["x", "s"], ["q"], name="q", domain="trt"),
        helper.make_node(OLD_NAMES[1], ["q", "s"], ["y"], name="dq", domain="trt"),
    ]
    function = helper.make_function("mine", "FakeQuantize", ["x"], ["y"], fake, imports)
    branch = [
        helper.make_node(OLD_NAMES[0], ["h", "t"], ["bq"], name="bq", domain="trt"),
        helper.make_node(OLD_NAMES[1], ["bq", "t"], ["b"], name="bdq", domain="trt"),
    ]
    then = helper.make_graph(branch, "then", [], [helper.make_tensor_value_info("b", 1, [8])])
    other = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["n"])], "else", [], [helper.make_tensor_value_info("n", 1, [8])]
    )
    nodes = [
        helper.make_node("FakeQuantize", ["x"], ["h"], domain="mine"),
        helper.make_node("ReduceMax", ["h"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "t"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    source = legacy.model(nodes, [tensor("t", np.array(0.5, np.float32))], {"x": (1, [8])}, {"y": (1, [8])})
    source.functions.append(function)
    source.opset_import.append(helper.make_opsetid("mine", 1))
    _, report = repaired(source, tmp_path)
    assert report.quantizers == {"QuantizeLinear": 2, "DequantizeLinear": 2} and report.shapes == 4
    x = np.linspace(-3, 3, 8).astype(np.float32)
    expected = legacy.dequantize(legacy.quantize(x, np.float32(0.25)), np.float32(0.25))
    assert np.array_equal(run(tmp_path / "new.onnx", -x * 0 - 1), np.full(8, 1, np.float32))
    expected = legacy.dequantize(legacy.quantize(expected, np.float32(0.5)), np.float32(0.5))
    assert np.array_equal(run(tmp_path / "new.onnx", x), expected)


def test_codes_that_are_an_output(tmp_path: Path) -> None:
    nodes = [helper.make_node(OLD_NAMES[0], ["x", "s"], ["q"], name="q", domain="trt")]
    scale = tensor("s", np.array(0.5, np.float32))
    model, _ = repaired(legacy.model(nodes, [scale], {"x": (1, [4])}, {"q": (TensorProto.UINT8, [4])}), tmp_path)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT8E4M3FN
    x = np.array([1, -2, 300, 0.1], np.float32)
    (codes,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert codes.dtype == FP8 and codes.tobytes() == legacy.quantize(x, np.float32(0.5)).tobytes()
