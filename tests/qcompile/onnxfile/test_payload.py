"""External data: regular files below the model's directory, or where the links of a cache lead, of the right size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.cli import main
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.precheck import precheck
from qcompile.errors import EngineError, QCompileError, RepairError
from qcompile.onnx.compare import run_onnx_intermediates
from qcompile.onnx.verify import verify_onnx

WEIGHT = np.arange(1024, dtype=np.float32).reshape(32, 32)


def save(path: Path, *entries: tuple[str, str], opset: int = 21) -> None:
    """x [1, 32] -> MatMul with a weight in `m.data` beside `path` -> y; `entries`: what the file says of that."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32]) for name in "xy")
    weight = numpy_helper.from_array(WEIGHT, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="gemm")]
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    (path.parent / "m.data").write_bytes(weight.raw_data)
    (stored,) = made.graph.initializer
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    for key, value in entries or (("location", "m.data"),):
        stored.external_data.add(key=key, value=value)
    path.write_bytes(made.SerializeToString())


def problem(path: Path) -> str:
    """What all readers say of the weight."""
    (check,) = [check for check in verify_onnx(path) if not check.passed]
    readers: tuple[tuple[type[QCompileError], Callable[[], object]], ...] = (
        (EngineError, lambda: precheck(OnnxGraph.load(path), 89)),
        (RepairError, lambda: qcompile.repair_onnx(path, path.with_name("new.onnx"))),
        (QCompileError, lambda: qcompile.onnx_session(path)),
    )
    for error, reader in readers:
        with pytest.raises(error) as caught:
            reader()
        assert check.detail in str(caught.value) and str(path) in str(caught.value)
    assert main(["inspect", str(path)]) == 1
    return check.detail


def at(location: str, **entries: str) -> tuple[tuple[str, str], ...]:
    return (("location", location), *entries.items())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (at("m.data", offset="-4"), "the offset '-4'"),
        (at("m.data", length="many"), "the length 'many'"),
        (at("m.data", offset="9" * 5000), "the offset '999"),
        (at("m.data", offset="8"), "has 4088 bytes in 'm.data', not the 4096"),
        (at("m.data", offset="99999999", length="4096"), "has 0 bytes"),
        (at("m.data", length="12"), "has 12 bytes"),
        ((*at("m.data"), ("location", "other")), "states its location twice"),
        (at("../m.data"), "outside the model's directory"),
        (at("/etc/hostname"), "outside the model's directory"),
        (at(""), "outside the model's directory"),
        (at("absent"), "not beside the model"),
        (at("pipe"), "no regular file"),
        (at("device"), "no regular file"),
        (at("."), "no regular file"),
        (at("link"), "a link that leads outside"),
    ],
)
def test_what_is_not_to_be_read(entries: tuple[tuple[str, str], ...], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    save(folder / "m.onnx", *entries)
    assert words in problem(folder / "m.onnx")


def test_inline_weights_of_another_size(tmp_path: Path) -> None:
    for number, tensor in enumerate(
        (
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32, 32], raw_data=bytes(9)),
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32, 32], float_data=[1.0]),
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32, 32]),
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], int32_data=[1]),
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40, 2**40], raw_data=bytes(9)),
        )
    ):
        path = tmp_path / f"{number}.onnx"
        save(path)
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].CopyFrom(tensor)
        path.write_bytes(model.SerializeToString())
        assert "initializer 'w' has" in problem(path)


def cache(folder: Path) -> Path:
    """As the hub's cache keeps a file and its data: names in a snapshot, contents by hash."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0f3c" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save(blobs / "m.onnx")
    for name, digest in (("m.onnx", "aaaa"), ("m.data", "bbbb")):
        (blobs / name).rename(blobs / digest)
        (snapshot / name).symlink_to(f"../../../blobs/{digest}")
    return snapshot / "m.onnx"


def linked(folder: Path) -> Path:
    """A link to a file that has its data beside it."""
    (folder / "there").mkdir()
    save(folder / "there" / "m.onnx")
    (folder / "here.onnx").symlink_to("there/m.onnx")
    return folder / "here.onnx"


def copied(folder: Path) -> Path:
    """A file of its own in a snapshot, whose data are a link to a blob."""
    path = cache(folder)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def doubled(folder: Path) -> Path:
    """Data that have a second name, as copies with hard links have."""
    save(folder / "m.onnx")
    os.link(folder / "m.data", folder / "other")
    return folder / "m.onnx"


@pytest.mark.parametrize("layout", [cache, linked, copied, doubled])
def test_links_that_every_reader_takes(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    path = layout(tmp_path)
    x = np.ones((1, 32), np.float32)
    assert main(["inspect", str(path)]) == 0
    graph = OnnxGraph.load(path)
    precheck(graph, 89)
    qcompile.repair_onnx(path, tmp_path / "new.onnx")
    for file in (path, tmp_path / "new.onnx"):
        np.testing.assert_array_equal(run_onnx_intermediates(file, {"x": x}, ["y"]).values["y"], x @ WEIGHT)
        np.testing.assert_array_equal(qcompile.onnx_session(file).run(None, {"x": x})[0], x @ WEIGHT)
    assert graph.path is not None and (graph.path.parent / "m.data").is_file()  # where TensorRT's parser looks
