"""What TensorRT-RTX has no operator for is refused by name before the build, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import qcompile
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
