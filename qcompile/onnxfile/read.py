"""The one place where ONNX files are opened: no reader sees a file, or a model, that is not sound."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qcompile.errors import QCompileError, VerificationError
from qcompile.onnxfile.names import check_text, said
from qcompile.onnxfile.nodes import subgraphs, tensor_problem
from qcompile.onnxfile.payload import (
    SMALL_BYTES,
    data_file,
    embedded,
    is_external,
    payload_bytes,
    payload_problem,
    span,
)
from qcompile.onnxfile.structure import check_structure
from qcompile.onnxfile.unsound import Unsound
from qcompile.onnxfile.wire import parse_without_weights

_MOST_INNER_BYTES = 64 << 20


@dataclass(frozen=True)
class OnnxFile:
    """A sound model with its weights left on disk, and the path beside which its external data lie."""

    path: Path
    model: onnx.ModelProto

    def problems(self) -> list[str]:
        """What is wrong with the sizes of initializers, or with the files that hold them."""
        return payload_problems(self.model, self.path)


def read_onnx(
    path: str | os.PathLike[str], *, small: int = SMALL_BYTES, error: type[QCompileError] = VerificationError
) -> OnnxFile:
    """The model at `path`; initializers above `small` bytes inside the file are external data in the file itself.

    Raises: `error` if it cannot be read, is no ONNX file, or is unsound: `qcompile.onnxfile.structure`.
    """
    name = os.fspath(path)
    try:
        if not _is_there(name):
            raise error(f"no ONNX file at '{name}'")
        found = Path(name)
        model = _map_and_parse(found, small)
        found = _beside_its_data(found, model)
        _embed_inner(model, found)
        check_structure(model)
    except Unsound as problem:
        raise error(f"'{name}' {problem}") from problem
    except OSError as problem:
        raise error(f"cannot read '{name}': {problem.strerror or problem}") from problem
    return OnnxFile(found, model)


def parse_onnx(data: bytes, error: type[QCompileError] = VerificationError) -> onnx.ModelProto:
    """The serialized model `data`, with initializers above `SMALL_BYTES` left out. Raises `error` as `read_onnx`."""
    try:
        model = _parse(memoryview(data), "", SMALL_BYTES)
        check_structure(model)
    except Unsound as problem:
        raise error(f"the serialized model {problem}") from problem
    return model


def check_sound(model: onnx.ModelProto, error: type[QCompileError] = VerificationError) -> None:
    """Raises `error` if a model in memory is unsound."""
    try:
        check_text(model)
        check_structure(model)
    except Unsound as problem:
        raise error(f"the model {problem}") from problem


def payload_problems(model: onnx.ModelProto, path: Path | None) -> list[str]:
    """A sentence for each initializer that has not the elements that its dims and type ask for."""
    found = ((tensor.name, payload_problem(tensor, path)) for tensor in model.graph.initializer)
    return [f"initializer '{name}' {problem}" for name, problem in found if problem]


def external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files that weights of the model at `path` lie in, but for itself. *Requires*: no `payload_problems`."""
    locations = sorted({span(tensor).location for tensor in model.graph.initializer if is_external(tensor)})
    return [data_file(location, path) for location in locations if location != path.name]


def rebase(model: onnx.ModelProto, path: Path) -> Path:
    """Let external data of `model`, a part of the file at `path`, lie below the folder that is returned, without links:
    ONNX Runtime takes none out of the folder that it is given. *Requires*: no `payload_problems`.
    """
    entries = [e for t in model.graph.initializer if is_external(t) for e in t.external_data if e.key == "location"]
    real = {entry.value: data_file(entry.value, path) for entry in entries}
    if not real:
        return path.parent
    folder = os.path.commonpath([file.parent for file in real.values()])
    for entry in entries:
        entry.value = os.path.relpath(real[entry.value], folder)
    return Path(folder)


def _is_there(name: str) -> bool:
    """Raises Unsound for what is there, and no file."""
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero in it
        return False
    if stat.S_ISDIR(mode):
        raise Unsound("is a directory, and no ONNX file")
    if not stat.S_ISREG(mode):  # a named pipe would be waited for
        raise Unsound("is no regular file")
    return True


def _map_and_parse(path: Path, small: int) -> onnx.ModelProto:
    if path.stat().st_size == 0:
        raise Unsound("is empty")
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return _parse(view, path.name, small)


def _parse(data: memoryview, location: str, small: int) -> onnx.ModelProto:
    try:
        model = parse_without_weights(data, location, small)
    except DecodeError as error:
        raise Unsound(f"is cut off or is no ONNX file: {said(error)}") from error
    check_text(model)
    if not model.graph.output:
        raise Unsound("is no ONNX model: it has no graph, or a graph without outputs")
    return model


def _beside_its_data(path: Path, model: onnx.ModelProto) -> Path:
    """`path`, or where that leads to if it is a link and the external data are only there."""
    if not path.is_symlink():
        return path
    locations = {e.value for t in _tensors(model) if is_external(t) for e in t.external_data if e.key == "location"}
    if not all(os.path.exists(path.parent / location) for location in locations):
        real = path.resolve()
        _relocate(model, path.name, real.name)
        return real
    return path


def _relocate(model: onnx.ModelProto, old: str, new: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if is_external(tensor) and entry.key == "location" and entry.value == old:
                entry.value = new


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    yield from _inner_tensors(model)


def _inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Those in attributes, in the graphs in them, and in functions."""
    yield from _of_nodes(model.graph.node)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            yield from graph.initializer
            yield from _of_nodes(graph.node)


def _embed_inner(model: onnx.ModelProto, path: Path) -> None:
    """Read in what is external and no weight of the main graph, which every reader takes to be at hand."""
    left = _MOST_INNER_BYTES
    for tensor in filter(is_external, _inner_tensors(model)):
        if problem := tensor_problem(tensor) or payload_problem(tensor, path):
            raise Unsound(f"has a tensor '{tensor.name}' of a node that {problem}")
        left -= payload_bytes(tensor)
        if left < 0:
            raise Unsound(f"keeps more than {_MOST_INNER_BYTES >> 20} MB of attributes in other files")
        tensor.CopyFrom(embedded(tensor, path))
