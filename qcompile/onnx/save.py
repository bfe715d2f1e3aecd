"""Write an ONNX file whole or not at all, with its weights inside or beside it."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from qcompile.errors import ExportError, QCompileError
from qcompile.files import folder_beside, move_all
from qcompile.onnx.wire import embed_weights

EMBEDDED_BYTES = 1_800_000_000  # protobuf holds 2 GB; the graph itself needs some of it


@contextlib.contextmanager
def onnx_folder(destination: Path, error: type[QCompileError] = ExportError) -> Iterator[Path]:
    """A folder to write an ONNX file called as `destination` into, alone or with a file of weights; both are moved to
    `destination` if the body succeeds, and then what only the older file there read is removed."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(destination, error) as folder:
        yield folder
        weights = [file for file in folder.iterdir() if file.name != destination.name]
        move_all([*weights, folder / destination.name], destination, lambda: _weights_of(destination))


@contextlib.contextmanager
def written_beside(model: onnx_ir.Model, destination: Path, error: type[QCompileError] = ExportError) -> Iterator[Path]:
    """Write `model` into a folder beside `destination`; move it in place if the body succeeds, drop it if not.

    A file of weights is called by what it holds: a graph can never be read with the weights of another.
    """
    with onnx_folder(destination, error) as folder:
        written = folder / destination.name
        weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
        if sum(weight.nbytes for weight in weights) <= EMBEDDED_BYTES:
            beside = written.with_name(f"{destination.name[:200]}.data")
            onnx_ir.save(model, written, external_data=beside.name)  # the way that copies no weight
            embed_weights(written)
            beside.unlink(missing_ok=True)
        elif destination.is_symlink():
            raise error(
                f"{destination} is a link, and its weights are more than an ONNX file holds: they go to a file beside"
                f" it, so name the file itself, {destination.resolve()}"
            )
        else:
            onnx_ir.save(model, written, external_data=f"{destination.name[:200]}.{_digest(model)}.data")
        yield written


def _digest(model: onnx_ir.Model) -> str:
    """Of names and values of the weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.graph.initializers.items():
        if (weight := value.const_value) is not None:
            digest.update(f"{name} {weight.dtype} {weight.shape}".encode())
            digest.update(memoryview(weight.tobytes()))
    return digest.hexdigest()


def _weights_of(destination: Path) -> set[Path]:
    """Files of weights beside `destination` that were written for an ONNX file of its name, which is there or was."""
    place = destination.resolve()
    ours = re.compile(rf"{re.escape(place.name[:200])}\.[0-9a-f]{{16}}\.data")
    found = {file for file in place.parent.iterdir() if ours.fullmatch(file.name)}
    beside = place.with_name(f"{place.name}.data")
    if beside.is_file() and beside.name in _locations(destination):
        found.add(beside)
    return found


def _locations(path: Path) -> set[str]:
    """The files that the ONNX file at `path`, if there is one, has its weights in."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):
        return set()
    tensors = [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]
    return {external_data_helper.ExternalDataInfo(tensor).location for tensor in tensors}
