"""Write an ONNX file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir

from qcompile.onnx.wire import embed_weights

EMBEDDED_BYTES = 1_800_000_000  # protobuf holds 2 GB; the graph itself needs some of it


def data_file(destination: Path) -> Path:
    """Where the weights of `destination` go if they do not fit into it."""
    return destination.with_name(f"{destination.name}.data")


@contextlib.contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """A folder beside `destination`; its files are moved there if the body succeeds, dropped if not."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda f: f.name == destination.name):  # weights first, graph last
            os.replace(file, destination.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def written_beside(model: onnx_ir.Model, destination: Path) -> Iterator[Path]:
    """Write `model` into a folder beside `destination`; move it in place if the body succeeds, drop it if not."""
    with folder_beside(destination) as folder:
        written = folder / destination.name
        weights = (value.const_value for value in model.graph.initializers.values())
        size = sum(weight.nbytes for weight in weights if weight is not None)
        beside = data_file(written)
        onnx_ir.save(model, written, external_data=beside.name)  # the way that copies no weight
        if size <= EMBEDDED_BYTES:
            embed_weights(written)
            beside.unlink(missing_ok=True)
        yield written
