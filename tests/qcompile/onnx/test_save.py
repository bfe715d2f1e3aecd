"""An ONNX file is written whole or not at all, whenever the writing stops."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.onnx import save


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_the_graph_is_never_there_without_its_weights(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that finds the graph finds the weights: stopped after any number of moves."""
    weight = np.arange(128, dtype=np.float32)
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [128])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [128])],
            [numpy_helper.from_array(weight, "w")],
        )
    )
    move, path = os.replace, tmp_path / "model.onnx"
    moved: list[Path] = []

    def stops(source: Path, destination: Path) -> None:
        if Path(destination).parent == tmp_path:  # not those of the files that are being written
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(destination)
        move(source, destination)

    monkeypatch.setattr(save, "EMBEDDED_BYTES", 0)
    monkeypatch.setattr(os, "replace", stops)
    stopped = contextlib.nullcontext() if moves == 2 else pytest.raises(KeyboardInterrupt)
    with stopped, save.written_beside(onnx_ir.serde.deserialize_model(proto), path):
        pass
    assert {file.name for file in tmp_path.iterdir()} == set(["model.onnx.data", "model.onnx"][:moves])
    if path.exists():
        (stored,) = onnx.load(path).graph.initializer
        np.testing.assert_array_equal(numpy_helper.to_array(stored), weight)
