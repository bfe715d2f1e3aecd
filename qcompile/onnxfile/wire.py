"""ONNX files whose weights are inside, read without them.

Protobuf can only parse a message as a whole, which takes the size of the weights once or twice over. The few rules of
its wire format that are needed to step over a weight are here:
a field is a tag (number << 3 | wire type) and, for wire type 2, a length and that many bytes.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_NESTED = 2  # the wire type of messages and bytes
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size


class Field(NamedTuple):
    """One field of a message: its number and wire type, where it starts (at the tag), where its content is and ends."""

    number: int
    kind: int
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
        if tag >> 3 == 0:  # no message has it, and a file of zeros would be a field a byte
            raise DecodeError(f"field 0 at byte {position}")
        if stop > end:
            raise DecodeError(f"the field at byte {position} ends behind its message")
        yield Field(tag >> 3, kind, position, content, stop)
        position = stop


def parse_without_weights(data: memoryview, location: str, small: int) -> onnx.ModelProto:
    """The model serialized in `data`, with each initializer above `small` bytes as external data in `location` itself.

    `location` is the name of the file that `data` is a map of. Raises DecodeError if it is no ONNX model.
    """
    rest, graph, tensors = bytearray(), bytearray(), []
    for field in fields(data, 0, len(data)):
        if (field.number, field.kind) != (_GRAPH, _NESTED):
            rest += data[field.start : field.end]
            continue
        for part in fields(data, field.content, field.end):
            if (part.number, part.kind) == (_INITIALIZER, _NESTED):
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
        if (field.number, field.kind) == (_RAW_DATA, _NESTED) and field.end - field.content > small:
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
