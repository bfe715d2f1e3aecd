"""What cannot be repaired is one clear error, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qcompile
from qcompile.errors import RepairError, VerificationError
from qcompile.onnx.repair import repair as repair_module
from qcompile.onnx.verify import Check
from tests.qcompile.onnx.legacy import STANDARD_NAMES, linear, tensor

Model = onnx.ModelProto


def constant(name: str, value: Any) -> Callable[[Model], None]:
    """Replaces initializer `name`."""

    def change(model: Model) -> None:
        (found,) = [t for t in model.graph.initializer if t.name == name]
        found.CopyFrom(tensor(name, value))

    return change


def dynamic_scale(model: Model) -> None:
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["am"], keepdims=0))
    model.graph.node[1].input[1] = "am"


def no_scale(model: Model) -> None:
    del model.graph.node[0].input[1:]


def graph_input_codes(model: Model) -> None:
    model.graph.node[1].input[0] = "x"


def blocks(model: Model) -> None:
    model.graph.node[2].attribute.append(helper.make_attribute("block_size", 16))


def with_zero_point(value: Any) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        model.graph.initializer.append(tensor("zp", value))
        model.graph.node[0].input.append("zp")

    return change


def dynamic_zero_point(model: Model) -> None:
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["zp"], to=onnx.TensorProto.FLOAT8E4M3FN))
    model.graph.node[1].input.append("zp")


def wrong_output(model: Model) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


CASES: dict[str, tuple[Callable[[Model], None], str]] = {
    "zero scale": (constant("x_scale", np.float32(0)), r"'x_quantize'.*'x_scale' has 1 of 1 values not > 0"),
    "negative": (constant("w_scale", np.float32(-1)), r"'w_quantize'.*-1\.0.*calibrate again"),
    "NaN": (constant("x_scale", np.float32("nan")), r"'x_quantize'.*nan"),
    "infinite": (constant("x_scale", np.full(40, np.inf, np.float32)), r"40 of 40"),
    "integer scale": (constant("x_scale", np.int32(1)), r"'x_quantize'.*int32, not float32"),
    "too many channels": (constant("w_scale", np.full(7, 0.1, np.float32)), r"7 scales do not fit axis 1"),
    "two axes": (constant("w_scale", np.full((3, 5), 0.1, np.float32)), r"\[3, 5\] is neither per tensor"),
    "integer weight": (constant("weight", np.ones((24, 40), np.int32)), r"'w_quantize'.*int32"),
    "dynamic scale": (dynamic_scale, r"'x_quantize'.*'am' is computed at run time.*calibrate"),
    "no scale": (no_scale, r"'x_quantize' has no scale"),
    "float codes": (graph_input_codes, r"'x_dequantize' reads 'x', which is FLOAT and not the output"),
    "blocks": (blocks, r"'w_quantize' has block scales"),
    "NaN zero point": (with_zero_point(np.uint8(0x7F)), r"'x_quantize'.*zero point 'zp' is NaN"),
    "float zero point": (with_zero_point(np.float32(0)), r"zero point 'zp' is float32, not FP8"),
    "zero points": (with_zero_point(np.zeros(3, np.uint8)), r"3 zero points in 'zp' for 1 scales"),
    "dynamic zero point": (dynamic_zero_point, r"'zp' is computed at run time"),
    "contradiction": (wrong_output, r"contradicts itself.*y"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_quantizer_is_named(case: str, tmp_path: Path) -> None:
    change, message = CASES[case]
    model = linear(opset=17)
    change(model)
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(RepairError, match=message):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["old.onnx"]


def test_a_quantizer_that_does_not_say_its_type(tmp_path: Path) -> None:
    model = linear(STANDARD_NAMES)
    del model.graph.node[0].input[2]
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(RepairError, match=r"'x_quantize' has neither a zero point nor output_dtype"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not an ONNX file at all", "no ONNX"),
        (linear().SerializeToString()[:-500], "cut off or is no ONNX file"),
        (onnx.ModelProto().SerializeToString() + b"\x08\x09", "no ONNX model"),
    ],
)
def test_what_is_no_onnx_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.onnx").write_bytes(content)
    with pytest.raises(RepairError, match=message):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["old.onnx"]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RepairError, match="no ONNX file at"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    onnx.save(linear(), tmp_path / "old.onnx")
    with pytest.raises(RepairError, match="is a directory"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path)


@pytest.mark.parametrize("cut", [None, 100])
def test_external_data_that_is_missing_or_short(cut: int | None, tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "old.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    if cut is None:
        (tmp_path / "w.bin").unlink()
    else:
        os.truncate(tmp_path / "w.bin", cut)
    with pytest.raises(RepairError, match=r"incomplete: initializer '\w+'.*'w.bin'"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()


@pytest.mark.parametrize("new", ["old.onnx", "link.onnx", "w.bin", "w"])
def test_the_old_file_is_never_changed(new: str, tmp_path: Path) -> None:
    """Nor a file of its weights, nor through a link; those of `w` would go to `w.data`, where the old ones are."""
    where = "w.data" if new == "w" else "w.bin"
    onnx.save(linear(), tmp_path / "old.onnx", save_as_external_data=True, location=where, size_threshold=0)
    (tmp_path / "link.onnx").symlink_to(tmp_path / "old.onnx")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RepairError, match="is part of the old file"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / new)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_check_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(linear(), tmp_path / "old.onnx")
    (tmp_path / "new.onnx").write_bytes(b"precious")
    monkeypatch.setattr(repair_module, "verify_foreign", lambda *_: [Check("mine", False, "not today")])
    with pytest.raises(VerificationError, match="mine: not today"):
        qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert (tmp_path / "new.onnx").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2
