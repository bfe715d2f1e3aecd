"""An ONNX file is written whole or not at all, whenever the writing stops."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ExportError
from qcompile.onnx import save


def model(weight: np.ndarray[Any, Any]) -> onnx_ir.Model:
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [128])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [128])],
            [numpy_helper.from_array(weight, "w")],
        )
    )
    return onnx_ir.serde.deserialize_model(proto)


OLD, NEW = np.arange(128, dtype=np.float32), -np.arange(128, dtype=np.float32)


def read(path: Path) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def write(path: Path, weight: np.ndarray[Any, Any]) -> None:
    with save.written_beside(model(weight), path):
        pass


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_graph_is_never_there_with_other_weights(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after any number of moves, a reader finds the old file or the new one, and the next run tidies up."""
    move, path = os.replace, tmp_path / "model.onnx"
    moved: list[Path] = []

    def stops(source: Path, destination: Path) -> None:
        if Path(destination).parent == tmp_path:  # not those of the files that are being written
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(destination)
        move(source, destination)

    monkeypatch.setattr(save, "EMBEDDED_BYTES", 0)
    write(path, OLD)
    monkeypatch.setattr(os, "replace", stops)
    with contextlib.nullcontext() if moves == 2 else pytest.raises(KeyboardInterrupt):
        write(path, NEW)
    np.testing.assert_array_equal(read(path), NEW if moves == 2 else OLD)
    assert len(list(tmp_path.iterdir())) == (3 if moves == 1 else 2)
    monkeypatch.setattr(os, "replace", move)
    write(path, NEW)
    np.testing.assert_array_equal(read(path), NEW)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", *save._locations(path)}


def test_weights_of_the_file_before_go_when_nothing_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx_ir.to_proto(model(OLD)), path, save_as_external_data=True, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    for name in ("mine.onnx.data", "model.onnx.mine.data"):
        (tmp_path / name).touch()
    write(path, NEW)
    np.testing.assert_array_equal(read(path), NEW)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "mine.onnx.data", "model.onnx.mine.data"}
    (tmp_path / "model.onnx.data").touch()  # the new file does not read it
    monkeypatch.setattr(save, "EMBEDDED_BYTES", 0)
    write(path, OLD)
    assert (tmp_path / "model.onnx.data").exists()
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    with pytest.raises(ExportError, match=r"link.onnx is a link, .* name the file itself, .*model.onnx"):
        write(link, NEW)
    np.testing.assert_array_equal(read(path), OLD)
