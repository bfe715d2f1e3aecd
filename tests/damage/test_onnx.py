"""Damaged ONNX files: `inspect`, `repair` and what comes before a build give a result or one clear error.

TensorRT and ONNX Runtime see none of them here; onnx's checker, its inference, inliner and converter see what passes.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qcompile
from qcompile.cli import main
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.precheck import check_operators, precheck
from qcompile.errors import QCompileError
from tests.damage.onnx_fields import mutated_model
from tests.damage.support import judge, mutated_bytes
from tests.qcompile.onnx.conftest import build
from tests.qcompile.onnx.legacy import linear, tensor
from tests.qcompile.onnx.test_repair_integers import KINDS, RNG

pytestmark = pytest.mark.slow

OF_INTEGERS = ("int32 bias, zero point into it", "opset 11", "operators on codes", "nbits 4, zero points")


def computed() -> onnx.ModelProto:
    """Scales and zero points that the file computes, a shape of Shape and Concat, and quantizers in a branch."""
    node = helper.make_node
    branch = helper.make_graph(
        [
            node("QuantizeLinear", ["r", "scale", "zeros"], ["bq"], axis=1),
            node("DequantizeLinear", ["bq", "scale", "zeros"], ["bd"], axis=1),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("bd", TensorProto.FLOAT, [4, 8])],
    )
    other = helper.make_graph(
        [node("Mul", ["r", "half"], ["be"])],
        "else",
        [],
        [helper.make_tensor_value_info("be", TensorProto.FLOAT, [4, 8])],
    )
    nodes = [
        node("ConstantOfShape", ["eight"], ["ones"], value=tensor("", np.ones(1, np.float32))),
        node("Range", ["from", "to", "step"], ["ramp"]),
        node("Cast", ["ramp"], ["numbers"], to=TensorProto.FLOAT),
        node("Tile", ["numbers", "twice"], ["tiled"]),
        node("Add", ["ones", "tiled"], ["sums"]),
        node("Mul", ["sums", "half"], ["scale"]),
        node("Expand", ["zero", "eight"], ["zeros"]),
        node("Shape", ["x"], ["shape"]),
        node("Concat", ["shape"], ["same"], axis=0),
        node("Reshape", ["x", "same"], ["r"]),
        node("Constant", [], ["flag"], value=tensor("", np.array(True))),
        node("If", ["flag"], ["y"], then_branch=branch, else_branch=other),
    ]
    constants = {
        **{"eight": np.array([8]), "from": np.int64(0), "to": np.int64(4), "step": np.int64(1), "twice": np.array([2])},
        **{"half": np.float32(0.5), "zero": np.int8(0)},
    }
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [tensor(name, value) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sources(folder: Path) -> dict[str, onnx.ModelProto]:
    """`m.data` in `folder` belongs to the one with external data."""
    folder.mkdir()
    found = {"legacy": linear(opset=17), "functions": build(), "computed": computed()}
    used = RNG.bit_generator.state  # the same files whatever ran before, and nothing else for what runs after
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
    for number, kind in enumerate(OF_INTEGERS):
        found[f"integers{number}"] = onnx.load(KINDS[kind]().save(folder / "source.onnx"))
    RNG.bit_generator.state = used
    onnx.save(build(), folder / "e.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    found["external"] = onnx.load(folder / "e.onnx", load_external_data=False)
    return found


def check(path: Path) -> None:
    """Raises the first error of a reader, after all of them have seen the file."""
    errors: list[QCompileError] = []
    assert main(["inspect", str(path)]) in (0, 1, 2)
    readers: tuple[Callable[[], object], ...] = (
        lambda: precheck(OnnxGraph.load(path), 89),
        lambda: check_operators(OnnxGraph.load(path)),
        lambda: OnnxGraph.load(path).weight_bytes(),
        lambda: qcompile.repair_onnx(path, path.with_name("new.onnx")),
    )
    for reader in readers:
        try:
            reader()
        except QCompileError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def cases(folder: Path, damaged: Callable[[onnx.ModelProto, random.Random], bytes], each: int) -> list[Path]:
    paths = []
    for name, model in sources(folder / "source").items():
        for number in range(each):
            path = folder / f"{name}-{number}" / "m.onnx"
            path.parent.mkdir()
            path.write_bytes(damaged(model, random.Random(f"{name} {number}")))
            if name == "external":
                shutil.copy(folder / "source" / "m.data", path.parent)
            paths.append(path)
    return paths


def test_bytes(tmp_path: Path) -> None:
    found = judge(cases(tmp_path, lambda m, draw: mutated_bytes(m.SerializeToString(), draw), 30), check)
    assert found["right"] > 5 and found["refused"] > 100


def test_fields(tmp_path: Path) -> None:
    found = judge(cases(tmp_path, lambda m, draw: mutated_model(m, draw).SerializeToString(), 60), check)
    assert found["right"] > 100 and found["refused"] > 100
