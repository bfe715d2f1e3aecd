"""Texts, and chats, in files: a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qcompile.errors import CalibrationError
from qcompile.messages import first_line, some, value
from qcompile.remedy import Remedy, with_remedy

SUFFIXES = (".txt", ".jsonl")
_TEXT, _CHAT = "text", "messages"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """A line that has something: its number in the file, from 1 on, and a text, or the messages of a chat."""

    number: int
    content: str | Messages


def read_lines(path: Path, column: str | None = None) -> Iterator[Line]:
    """The lines of a `.txt` file, stripped, or what each object of a `.jsonl` file has; empty ones are left out.

    Args:
        column: its key; None is "text", and "messages" where there is no such key.

    Raises:
        CalibrationError: names file and line of what is no UTF-8, no JSON, or has no text.
    """
    number = 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                content = _of_json(line, path, number, column) if path.suffix == ".jsonl" else line
                if isinstance(content, str):
                    if "\0" in content:
                        raise CalibrationError(f"{path}:{number} holds a zero byte: it is no text")
                    content = content.strip()
                if content:
                    yield Line(number, content)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is no UTF-8 text, from line {number} or soon after: {error.reason}") from error


def _of_json(line: str, path: Path, number: int, column: str | None) -> str | Messages:
    if not line.strip():
        return ""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}:{number} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CalibrationError(f"{path}:{number} is a {type(content).__name__}; {_wanted(column)}")
    key = column or (_TEXT if _TEXT in content or _CHAT not in content else _CHAT)
    found = content.get(key)
    if isinstance(found, str) or _is_chat(found):
        return found
    if key in content:
        raise CalibrationError(f"{path}:{number}: {value(key)} is {value(found)}; {_wanted(column)}")
    problem = CalibrationError(f"{path}:{number} has the keys {some(list(content))}; {_wanted(column)}")
    texts = [name for name, other in content.items() if isinstance(other, str) and other]
    raise with_remedy(problem, Remedy(options={"--text-column": (texts[0],)}) if len(texts) == 1 else Remedy())


def _is_chat(found: object) -> TypeGuard[Messages]:
    """Whether it is the messages of a chat, as chat templates take them."""
    return isinstance(found, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found)


def _wanted(column: str | None) -> str:
    if column is not None:
        return f"an object with {value(column)}, a string or the messages of a chat, is wanted on each line"
    return (
        f'an object with a string "{_TEXT}", or the "{_CHAT}" of a chat, is wanted on each line; a text column says'
        " what it is called otherwise"
    )
