"""What TensorRT-RTX has no operator for is refused by name before the build, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import qcompile
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.precheck import precheck
from qcompile.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")

_HALVES = numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), "halves")


def file_of(node: NodeProto, inputs: dict[str, tuple[int, list[int]]], y: tuple[int, list[int]], path: Path) -> Path:
    given = [helper.make_tensor_value_info(name, *form) for name, form in inputs.items()]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", *y)], [_HALVES])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


_INTS, _ROWS = (TensorProto.INT32, [4]), (TensorProto.FLOAT, [4, 8])
_IMAGE = (TensorProto.FLOAT, [1, 3, 8, 8])
_SCATTER = {"x": _ROWS, "i": (TensorProto.INT64, [4, 1]), "u": _ROWS}


@pytest.mark.parametrize(
    ("op_type", "inputs", "y", "attributes", "said"),
    [
        ("BitwiseOr", {"a": _INTS, "b": _INTS}, _INTS, {}, r"bits of integers.*Compute masks as booleans"),
        ("ScatterND", _SCATTER, _ROWS, {"reduction": "add"}, r"reduces by index.*one_hot"),
        (
            "Resize",
            {"x": _IMAGE, "": _IMAGE, "halves": _IMAGE},
            (TensorProto.FLOAT, [1, 3, 4, 4]),
            {"antialias": 1, "mode": "linear"},
            r"antialiasing.*without it",
        ),
        ("Det", {"x": (TensorProto.FLOAT, [4, 4])}, (TensorProto.FLOAT, []), {}, r"determinant.*outside"),
    ],
)
def test_it_is_named(op_type: str, inputs: Any, y: Any, attributes: Any, said: str, tmp_path: Path) -> None:
    given = {name: form for name, form in inputs.items() if name not in ("", "halves")}
    file = file_of(helper.make_node(op_type, list(inputs), ["y"], **attributes), given, y, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=rf"cannot take the file: .*{op_type} .*{said}.*run the file in ONNX Runtime"):
        qcompile.build_engine(file, target="sm89", progress=False)


def test_the_same_operators_build_where_they_do_not_do_that(tmp_path: Path) -> None:
    for node, inputs, y in (
        (helper.make_node("ScatterND", list(_SCATTER), ["y"]), _SCATTER, _ROWS),
        (helper.make_node("Resize", ["x", "", "halves"], ["y"], mode="linear"), {"x": _IMAGE}, (1, [1, 3, 4, 4])),
    ):
        qcompile.build_engine(file_of(node, inputs, y, tmp_path / "m.onnx"), target="sm89", progress=False)


@pytest.mark.parametrize(("kernel", "groups", "half_on"), [(7, 16, [89]), (7, 1, [89, 120]), (5, 1, [])])
def test_convolutions_that_a_target_runs_in_half_are_told_before(
    kernel: int, groups: int, half_on: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of another target, or of another tool: they are right, and slower than without quantizers."""
    fp8 = TensorProto.FLOAT8E4M3FN
    codes = helper.make_tensor(
        "codes", fp8, [16, 16 // groups, kernel, kernel], bytes(16 * 16 // groups * kernel**2), raw=True
    )
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    zero = helper.make_tensor("zero", fp8, [], bytes(1), raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
        helper.make_node("Conv", ["dq", "w"], ["y"], name="/stem/Conv", group=groups),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, size, size])
        for name, size in (("x", 9), ("y", 10 - kernel))
    )
    graph = helper.make_graph(nodes, "g", [x], [y], [codes, scale, zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    for target in (89, 120):
        caplog.clear()
        precheck(OnnxGraph.load(tmp_path / "m.onnx"), target)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (target in half_on)
        assert all(
            f"sm{target} runs in half precision" in one and "stem" in one and "kernels of at most 32" in one
            for one in told
        )
