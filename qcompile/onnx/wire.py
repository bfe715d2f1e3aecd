"""ONNX files with their weights inside, written one weight at a time, as `qcompile.onnxfile.wire` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import external_data_helper

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_BUFFER_BYTES = 1 << 20


def embed_weights(path: Path) -> None:
    """Rewrite the ONNX file at `path`, whose weights are external data, as one file that holds them."""
    model = onnx.load_model(path, load_external_data=False)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = [_head_and_source(tensor, path.parent) for tensor in tensors]
    sizes = [len(head) + (source[2] if source else 0) for head, source in heads]
    total = len(graph) + sum(len(_tag(_INITIALIZER, size)) + size for size in sizes)
    whole = path.with_name(f"{path.name}.whole")
    with open(whole, "wb") as out:
        out.write(model.SerializeToString())
        out.write(_tag(_GRAPH, total))
        out.write(graph)
        for (head, source), size in zip(heads, sizes, strict=True):
            out.write(_tag(_INITIALIZER, size))
            out.write(head)
            if source is not None:
                _copy(*source, out)
    whole.replace(path)


def _head_and_source(tensor: onnx.TensorProto, folder: Path) -> tuple[bytes, tuple[Path, int, int] | None]:
    """A tensor's bytes up to its elements, and (file, offset, length) of those if they lie outside."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor.SerializeToString(), None
    info = external_data_helper.ExternalDataInfo(tensor)
    assert info.length is not None
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    head = tensor.SerializeToString() + _tag(_RAW_DATA, info.length)
    return head, (folder / info.location, info.offset or 0, info.length)


def _copy(source: Path, offset: int, length: int, out: BinaryIO) -> None:
    with open(source, "rb") as file:
        file.seek(offset)
        remaining = length
        while remaining:
            chunk = file.read(min(remaining, _BUFFER_BYTES))
            if not chunk:
                raise OSError(f"{source} ends before byte {offset + length}")
            out.write(chunk)
            remaining -= len(chunk)


def _tag(number: int, length: int) -> bytes:
    """Tag and length of a field of wire type 2."""
    out = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)
