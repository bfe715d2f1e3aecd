"""Text in ONNX files: what may be a name, and how a node is called in messages."""

from __future__ import annotations

from typing import Any

import onnx
from google.protobuf.message import Message

from qcompile.onnxfile.unsound import Unsound

_STRING, _MESSAGE = 9, 11  # FieldDescriptor.TYPE_*
_LONGEST_NAME, _LONGEST_SAID = 4096, 1000
_FREE = frozenset({"doc_string", "value"})  # notes, which nothing here shows


def check_text(message: Any) -> None:
    """Raises Unsound if a text in `message`, or in a message below it, is no UTF-8, or a name cannot be shown.

    Protobuf's Python hands out bytes where a text is no UTF-8, and onnx's C++ dies of converting them.
    """
    for field, value in message.ListFields():
        if field.type == _MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                check_text(inner)
        elif field.type == _STRING:
            for text in (value,) if isinstance(value, str | bytes) else value:
                _check(text, field.name)


def _check(text: str | bytes, field: str) -> None:
    if not isinstance(text, str):
        raise Unsound(f"has a {field.replace('_', ' ')} that is no UTF-8: {text[:40]!r}")
    if field in _FREE or (text.isprintable() and len(text) <= _LONGEST_NAME):
        return
    why = "holds characters that cannot be printed" if len(text) <= _LONGEST_NAME else f"has {len(text):,} characters"
    raise Unsound(f"has a {field.replace('_', ' ')} that {why}: {text[:40]!a}")


def said(error: BaseException) -> str:
    """What another library says of a stranger's file, in one line that can be shown."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:_LONGEST_SAID])
    return text if len(text) < _LONGEST_SAID else f"{text} ..."


def shown(node: onnx.NodeProto) -> str:
    """`MatMul 'n12'`, or by its first output where it has no name."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{operator} '{node.name or next(iter(node.output), '')}'"
