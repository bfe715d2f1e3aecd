"""ONNX models with some of their fields changed: what a writer with a fault, or with bad intent, would leave."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (0, 1, -1, 2, 3, 7, 8, 16, 99, 2**31 - 1, -(2**31), 2**62, -(2**63))
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38)
_TEXTS = ("", "x", "\x1b[31m", "../x", "/etc/hostname", "ai.onnx", "-1", "9" * 30, "nan", "[['a'], 1]", "(" * 300)


def mutated_model(model: onnx.ModelProto, draw: random.Random) -> onnx.ModelProto:
    """A copy of `model` with one to three fields lost, doubled, moved, exchanged or set to something else.

    Each kind of field is as likely as any other, however often it occurs.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for _ in range(draw.randint(1, 3)):
        kinds: dict[str, list[tuple[Message, FieldDescriptor]]] = defaultdict(list)
        for message in _messages(result):
            for field in message.DESCRIPTOR.fields:
                kinds[field.full_name].append((message, field))
        messages = kinds[draw.choice(sorted(kinds))]
        _mutate(*draw.choice(messages), draw, [message for message, _ in messages])
    return result


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                yield from _messages(inner)


def _mutate(message: Message, field: FieldDescriptor, draw: random.Random, others: list[Message]) -> None:
    value = getattr(message, field.name)
    if isinstance(value, Message):
        if draw.random() < 0.5:
            message.ClearField(field.name)
        else:
            value.CopyFrom(getattr(draw.choice(others), field.name))
    elif isinstance(value, str | bytes | int | float):
        if draw.random() < 0.15:
            message.ClearField(field.name)
        else:
            _set(message, field, _other(field, value, draw, [getattr(other, field.name) for other in others]))
    else:
        _mutate_list(value, field, draw, [item for other in others for item in getattr(other, field.name)])


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    try:
        setattr(message, field.name, value)
    except ValueError:  # no number of a closed enumeration, or of 32 bits
        message.ClearField(field.name)


def _mutate_list(values: Any, field: FieldDescriptor, draw: random.Random, pool: list[Any]) -> None:
    kept = list(values)
    at = draw.randrange(len(kept)) if kept else 0
    how = draw.randrange(5)
    if kept and how == 0:
        del kept[at]
    elif kept and how == 1:
        kept.append(kept[at])
    elif kept and how == 2:
        draw.shuffle(kept)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        kept[at : at + 1] = [draw.choice(pool)] if pool else []
    else:
        kept[at : at + 1] = [_other(field, kept[at] if kept else None, draw, pool)]
    copies = []
    for item in kept:
        if isinstance(item, Message):
            copy = type(item)()
            copy.CopyFrom(item)
            item = copy
        copies.append(item)
    del values[:]
    with contextlib.suppress(ValueError):  # no number of 32 bits
        values.extend(copies)


def _other(field: FieldDescriptor, value: Any, draw: random.Random, pool: list[Any]) -> Any:
    if pool and draw.random() < 0.5:
        return draw.choice(pool)
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw.choice((*_TEXTS, f"{value}x"))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw.choice((b"", b"\xff\xfe", draw.randbytes(7), bytes(value or b"") * 2, bytes(value or b"")[:-1]))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw.choice([entry.number for entry in field.enum_type.values])
    return draw.choice(_INTEGERS)
