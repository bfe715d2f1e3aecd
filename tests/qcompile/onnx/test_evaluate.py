"""Constants that a file computes are computed up to a bounded size, however long and branched the way to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.cli import main
from qcompile.errors import RepairError, VerificationError
from qcompile.onnx.verify import verify_onnx
from qcompile.onnx.view import ModelView

node = helper.make_node


def quantized_by(nodes: list[onnx.NodeProto], **constants: Any) -> onnx.ModelProto:
    """x [2, 2] -> Q -> DQ -> y, where `nodes` compute `scale`."""
    quantizers = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    values = {**constants, "zero": np.int8(3)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph([*nodes, *quantizers], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def reduced(first: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    return quantized_by([first, node("ReduceMax", ["big"], ["scale"], keepdims=0)], **constants)


ONE, HUGE = np.ones(1, np.float32), np.array([10**10])
BOMBS = {
    "ConstantOfShape": lambda: reduced(
        node("ConstantOfShape", ["size"], ["big"], value=numpy_helper.from_array(ONE)), size=HUGE
    ),
    "Expand": lambda: reduced(node("Expand", ["one", "size"], ["big"]), one=ONE, size=HUGE),
    "Tile": lambda: reduced(node("Tile", ["one", "size"], ["big"]), one=ONE, size=HUGE),
    "Range": lambda: reduced(
        node("Range", ["a", "b", "c"], ["big"]), a=np.float32(0), b=np.float32(1e12), c=np.float32(1)
    ),
    "Add": lambda: reduced(
        node("Add", ["a", "b"], ["big"]), a=np.ones((60_000, 1), np.float32), b=np.ones((1, 60_000), np.float32)
    ),
    "Gather": lambda: reduced(
        node("Gather", ["a", "b"], ["big"]), a=np.ones((1, 9000), np.float32), b=np.zeros(90_000, np.int64)
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_constant_out_of_proportion_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(BOMBS[kind](), path)
    with pytest.raises(VerificationError, match=f"{kind} 'big' computes a constant that is out of proportion"):
        verify_onnx(path)
    with pytest.raises(RepairError, match=f"{kind} 'big' computes a constant that is out of proportion"):
        qcompile.repair_onnx(path, tmp_path / "new.onnx")
    assert main(["inspect", str(path)]) == 1


def test_what_cannot_be_computed_names_its_node() -> None:
    model = quantized_by([node("Reshape", ["one", "size"], ["scale"], name="r")], one=ONE, size=np.array([7, 0]))
    with pytest.raises(VerificationError, match="Reshape 'r' has constant inputs that it cannot compute with"):
        ModelView(model).value("scale")


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Identity", [f"v{k}"], [f"v{k + 1}"]) for k in range(550)],
        [node("Min", [f"v{k}", f"v{k}"], [f"v{k + 1}"]) for k in range(60)],  # 2^60 ways
    ],
    ids=["long", "branched"],
)
def test_any_way_to_a_small_constant_is_gone_once(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    nodes[-1].output[0] = "scale"
    model = quantized_by(nodes, v0=np.float32(0.5))
    assert ModelView(model).value("scale") == 0.5
    onnx.save(model, tmp_path / "m.onnx")
    assert qcompile.repair_onnx(tmp_path / "m.onnx", tmp_path / "new.onnx").offsets


def test_operators_of_unknown_cost_are_not_run() -> None:
    """A Loop of constants may go on for ever."""
    given = {"i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, []), "v": (TensorProto.FLOAT, [])}
    made = {"true": (TensorProto.BOOL, []), "start": (TensorProto.FLOAT, [])}  # of the graph around it
    values = [[helper.make_tensor_value_info(name, *of) for name, of in group.items()] for group in (given, made)]
    body = helper.make_graph([], "body", *values)
    loop = node("Loop", ["count", "true", "start"], ["scale"], body=body)
    view = ModelView(quantized_by([loop], count=np.int64(10**15), true=np.array(True), start=np.float32(1)))
    assert "scale" in view.constants and view.value("scale") is None
