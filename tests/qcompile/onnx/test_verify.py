"""The verifier as a whole, and the checks of structure: checker, opaque operators, shapes, opsets, dependence."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompile.errors import VerificationError
from qcompile.onnx.verify import CHECKS, Check, onnx_dependence, require, verify_onnx


def verdict(model: Any, name: str, **options: Any) -> Check:
    """The check of that name; it is the only one allowed to fail."""
    checks = {check.name: check for check in verify_onnx(getattr(model, "proto", model), **options)}
    assert {n for n, check in checks.items() if not check.passed} <= {name}
    return checks[name]


def failed(model: Any, name: str, *words: str, **options: Any) -> str:
    check = next(c for c in verify_onnx(getattr(model, "proto", model), **options) if c.name == name)
    assert not check.passed
    for word in words:
        assert word in check.detail
    return check.detail


@pytest.mark.parametrize("options", [{}, {"dtype": np.float16}, {"opset": 19}, {"opset": 23, "ir_version": 11}])
def test_a_good_model_passes_everything(make_model: Any, options: dict[str, Any]) -> None:
    model = make_model(**options)
    onnx.checker.check_model(model.proto, full_check=True)
    checks = verify_onnx(model.proto)
    assert [check.name for check in checks] == [name for name, _ in CHECKS]
    require(checks)


def test_a_static_model_passes(make_model: Any) -> None:
    require(verify_onnx(make_model(tokens=4).proto))


def test_require_names_every_failure() -> None:
    with pytest.raises(VerificationError, match=r"fails 2 checks:\n  scales: a\n  shapes: b"):
        require([Check("scales", False, "a"), Check("casts", True, ""), Check("shapes", False, "b")])


def test_many_problems_are_counted(model: Any) -> None:
    for i in range(9):
        model.set(f"unused{i}", np.zeros(2, np.float32))
    assert failed(model, "float_weights").endswith("and 4 more")


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = model.proto.SerializeToString(deterministic=True)
    verify_onnx(model.proto)
    assert model.proto.SerializeToString(deterministic=True) == before


def test_a_file_with_external_data(model: Any, tmp_path: Path) -> None:
    model.set("weight2", np.zeros((512, 16), np.float32))
    model.add("Concat", ["h"] * 32, "h512", before="hq", axis=-1)
    model.add("MatMul", ["h512", "weight2"], "h2", before="hq")
    model.node("hq").input[0] = "h2"
    path = tmp_path / "m.onnx"
    onnx.save(model.proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    require(verify_onnx(path))
    with open(tmp_path / "m.data", "r+b") as file:
        file.truncate(100)
    assert "'m.data'" in failed(path, "payloads", "initializer 'weight2'", "32768")
    (tmp_path / "m.data").unlink()
    failed(path, "payloads", "'m.data', which is not beside the model")
    failed(onnx.load(path, load_external_data=False), "payloads", "verify the file by its path")


def test_a_3_gb_file_is_verified_without_reading_it(tmp_path: Path) -> None:
    """The data is a hole in a sparse file, so that the disk holds nothing of it either."""
    rows = 3 * 2**30 // (4096 * 2)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[rows, 4096])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="big.data")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4096])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "big.onnx"
    )
    with open(tmp_path / "big.data", "wb") as file:
        os.truncate(file.fileno(), rows * 4096 * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    require(verify_onnx(tmp_path / "big.onnx"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\x0f not ONNX", "is cut off or is no ONNX file")])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=words):
        verify_onnx(path)


def test_short_payload(model: Any) -> None:
    weight = next(t for t in model.proto.graph.initializer if t.name == "weight")
    weight.raw_data = weight.raw_data[:-1]
    failed(model, "payloads", "'weight'", "255 bytes", "256")


def test_checker_rejects_an_unsorted_graph(model: Any) -> None:
    kept = list(model.proto.graph.node)[::-1]
    del model.proto.graph.node[:]
    model.proto.graph.node.extend(kept)
    assert "topological" in failed(model, "checker")
    assert verify_onnx(model.proto)[-1].name == "checker"  # nothing below it would mean anything


def test_opaque_operator_without_a_body(model: Any) -> None:
    del model.proto.functions[:]
    failed(model, "nothing_opaque", "trt::TRT_QuantizedAttention 'n_y'", "module 'vit.layers.0.attention'")


def test_opaque_operator_inside_a_body(model: Any) -> None:
    model.proto.functions[0].node[3].domain = "com.microsoft"
    model.proto.functions[0].opset_import.add(domain="com.microsoft", version=1)
    model.proto.opset_import.add(domain="com.microsoft", version=1)
    failed(model, "nothing_opaque", "com.microsoft::Softmax", "in function trt::TRT_QuantizedAttention")


def test_shapes_without_value_info(model: Any) -> None:
    """A Q/DQ whose shape only value_info tells: Reshape to a shape that a graph input gives has an unknown rank."""
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, ["R"])
    model.proto.graph.input.append(shape)
    model.add("Reshape", ["h", "shape"], "h_reshaped", before="hq")
    model.node("hq").input[0] = "h_reshaped"
    for name, elem_type in (("h_reshaped", 1), ("hq", TensorProto.FLOAT8E4M3FN), ("hd", 1)):
        model.proto.graph.value_info.append(helper.make_tensor_value_info(name, elem_type, ["N", 32, 16]))
    onnx.checker.check_model(model.proto, full_check=True)
    failed(
        model, "shapes", "QuantizeLinear 'n_hq'", "DequantizeLinear 'n_hd'", "module 'vit.layers.0.attention.q_proj'"
    )


def test_shapes_reject_wrong_value_info(model: Any) -> None:
    model.proto.graph.value_info.append(helper.make_tensor_value_info("xq", TensorProto.INT8, ["N", 32, 16]))
    failed(model, "shapes", "strict shape inference", "'n_xd' (module 'vit.layers.0.attention.q_proj')")


def test_opset_too_low_for_fp8(model: Any) -> None:
    model.proto.opset_import[0].version = 18
    model.proto.functions[0].opset_import[0].version = 18
    failed(model, "opsets", "FLOAT8E4M3FN, which needs opset 19", "opset 18")


def test_ir_version_too_low(model: Any) -> None:
    model.proto.ir_version = 8
    failed(model, "opsets", "IR version 9", "IR version 8")


@pytest.mark.parametrize(
    ("output", "name", "value", "need"), [("xq", "output_dtype", 17, 21), ("xd", "output_dtype", 1, 23)]
)
def test_attribute_newer_than_the_opset(make_model: Any, output: str, name: str, value: int, need: int) -> None:
    model = make_model(opset=need - 2)
    model.node(output).attribute.append(helper.make_attribute(name, value))
    failed(model, "opsets", f"'{name}' needs opset {need}", f"n_{output}")


def test_function_with_another_opset(model: Any) -> None:
    model.proto.functions[0].opset_import[0].version = 19
    failed(model, "opsets", "function trt::TRT_QuantizedAttention has opset 19")


def test_dependence_against_the_source_program(model: Any) -> None:
    source = {"y": {"x", "mask"}}
    assert onnx_dependence(model.proto) == source
    assert verdict(model, "input_dependence", reference_dependence=source).passed
    model.node("hq").input[0] = "h0"  # the mask was folded away
    failed(model, "input_dependence", "'y' no longer depends on input 'mask'", reference_dependence=source)
    failed(model, "input_dependence", "input 'mask' changes no output")


def test_dependence_by_shape_only_is_none(model: Any) -> None:
    model.add("Shape", ["mask"], "mask_shape", before="h")
    model.add("ConstantOfShape", ["mask_shape"], "ones", before="h")
    model.node("h").input[1] = "ones"
    failed(model, "input_dependence", "'mask'", reference_dependence={"y": {"x", "mask"}})
    assert verdict(model, "input_dependence").passed  # with no source to ask, the shape of the mask is a use of it


def test_dependence_sees_through_functions_and_subgraphs(model: Any) -> None:
    call = model.node("y")
    call.input[3] = "mask"  # the body ignores its mask
    model.node("h").input[1] = "bias"
    failed(model, "input_dependence", "'mask'", reference_dependence={"y": {"x", "mask"}})
    branch = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("h0", "mask")]
    info = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None) for name in ("h0", "mask")]
    graphs = [helper.make_graph([n], "branch", [], [i]) for n, i in zip(branch, info, strict=True)]
    model.set("yes", np.array(True))
    model.add("If", ["yes"], "chosen", before="h", then_branch=graphs[0], else_branch=graphs[1])
    model.node("h").input[0] = "chosen"
    assert onnx_dependence(model.proto) == {"y": {"x", "mask"}}


def test_dependence_names_a_missing_or_constant_output(model: Any) -> None:
    failed(model, "input_dependence", "output 'z'", "not in the file", reference_dependence={"z": {"x"}})
    model.add("Identity", ["bias"], "constant", before="xq")
    model.proto.graph.output.append(helper.make_tensor_value_info("constant", 1, [16]))
    failed(model, "input_dependence", "output 'constant' depends on no input")
