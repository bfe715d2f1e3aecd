"""ONNX files with their weights inside, read and written one weight at a time.

Protobuf can only parse or serialize a message as a whole, which takes the size of the weights once or twice over. The
few rules of its wire format that are needed to step over a weight, or to put one in place, are here:
a field is a tag (number << 3 | wire type) and, for wire type 2, a length and that many bytes.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_BUFFER_BYTES = 1 << 20
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size


class Field(NamedTuple):
    """One field of a message: its number, where it starts (at the tag), and where its content starts and ends."""

    number: int
    start: int
    content: int
    end: int


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in `data[start:end]`. Raises DecodeError if it is cut off."""
    position = start
    while position < end:
        tag, content = _varint(data, position)
        kind = tag & 7
        if kind == 2:
            length, content = _varint(data, content)
            stop = content + length
        elif kind in _FIXED_BYTES:
            stop = content + _FIXED_BYTES[kind]
        elif kind == 0:
            stop = _varint(data, content)[1]
        else:
            raise DecodeError(f"wire type {kind} at byte {position}")
        if stop > end:
            raise DecodeError(f"the field at byte {position} ends behind its message")
        yield Field(tag >> 3, position, content, stop)
        position = stop


def parse_without_weights(data: memoryview, location: str, small: int) -> onnx.ModelProto:
    """The model serialized in `data`, with each initializer above `small` bytes as external data in `location` itself.

    `location` is the name of the file that `data` is a map of. Raises DecodeError if it is no ONNX model.
    """
    rest, graph, tensors = bytearray(), bytearray(), []
    for field in fields(data, 0, len(data)):
        if field.number != _GRAPH:
            rest += data[field.start : field.end]
            continue
        for part in fields(data, field.content, field.end):
            if part.number == _INITIALIZER:
                tensors.append(_tensor(data, part, location, small))
            else:
                graph += data[part.start : part.end]
    model = onnx.ModelProto()
    model.ParseFromString(bytes(rest))
    model.graph.MergeFromString(bytes(graph))
    model.graph.initializer.extend(tensors)
    return model


def _tensor(data: memoryview, part: Field, location: str, small: int) -> onnx.TensorProto:
    head, raw = bytearray(), None
    for field in fields(data, part.content, part.end):
        if field.number == _RAW_DATA and field.end - field.content > small:
            raw = field
        else:
            head += data[field.start : field.end]
    tensor = onnx.TensorProto()
    tensor.ParseFromString(bytes(head))
    if raw is not None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", raw.content), ("length", raw.end - raw.content)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor


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


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and where it ends."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise DecodeError(f"no integer ends at byte {position}")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _tag(number: int, length: int) -> bytes:
    """Tag and length of a field of wire type 2."""
    out = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)
