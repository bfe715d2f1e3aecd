"""Data that somebody else may have made: what pydantic finds wrong with them, and text that it cannot take."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import ValidationError

from qcompile.messages import cut


def reason(error: ValidationError) -> str:
    """The first thing that is wrong, with its place in the data, and how many more there are."""
    first, *more = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    told = f"{place}: {message}" if place else message
    return cut(told, 300) + (f", and {len(more)} more" if more else "")


def encodable(value: Any) -> Any:
    """`value` with the parts of names that UTF-8 does not have written out: `\\udcff`, for a byte of a file's name."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(encodable, value))
    if isinstance(value, list | tuple):
        return type(value)(map(encodable, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: encodable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
