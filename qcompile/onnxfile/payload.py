"""The elements of a tensor in an ONNX file: how many bytes they are, where they lie, and reading them."""

from __future__ import annotations

import itertools
import math
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

# Larger payloads play no part in shape inference; the exporters keep anything that does (shapes, axes) far smaller.
SMALL_BYTES = 1024

_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), 2),
}
_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})
_LONGEST_NUMBER = 19  # digits; files have fewer bytes
_WIDE_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_FIELDS = (*sorted(set(_WIDE_FIELDS.values())), "int32_data")


class Span(NamedTuple):
    """Where the elements of an external tensor lie; without a length they go on to the end of the file."""

    location: str
    offset: int
    length: int | None


def is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def element_bits(data_type: int) -> int:
    """Bits that an element of a known type takes when packed."""
    known = _BITS.get(data_type)
    return known if known is not None else 8 * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def payload_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the elements of `tensor` take when packed, from its dims and element type."""
    count: int = math.prod(tensor.dims)
    return (count * element_bits(tensor.data_type) + 7) // 8


def span(tensor: onnx.TensorProto) -> Span:
    """Where the file says that the elements of `tensor` lie. Raises ValueError for what cannot be said so."""
    stated: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in stated:  # readers disagree on which of the two counts
            raise ValueError(f"states its {entry.key} twice")
        if entry.key in _KEYS:
            stated[entry.key] = entry.value
    numbers = {key: _number(key, stated[key]) for key in ("offset", "length") if key in stated}
    return Span(stated.get("location", ""), numbers.get("offset", 0), numbers.get("length"))


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER):
        raise ValueError(f"has the {key} {text[:40]!r} in its external data, which is no size in bytes")
    return int(text)


def data_file(location: str, path: Path) -> Path:
    """The regular file of external data that `location` names for the ONNX file at `path`.

    It is below the folder of `path`; or, if that is a link, below the folder of the file that it leads to; or, in a
    cache of Hugging Face's hub, among the blobs that `snapshots/<revision>/<name>` are links to.

    Raises: ValueError with the rest of a sentence about the tensor.
    """
    parts = Path(location).parts
    if not location or "\0" in location or Path(location).is_absolute() or ".." in parts:
        raise ValueError(f"points outside the model's directory: '{location[:200]}'")
    named = path.parent / location
    try:
        mode = named.stat().st_mode
    except OSError as error:
        raise ValueError(f"points at '{location[:200]}', which is not beside the model") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"points at '{location[:200]}', which is no regular file")
    real = named.resolve()
    homes = [path.parent.resolve(), path.resolve().parent, *_blobs(path)]
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"points at '{location[:200]}', a link that leads outside the model's directory")
    return real


def _blobs(path: Path) -> list[Path]:
    """The folder of blobs of the hub's cache that `path` lies in: <cache>/<model>/snapshots/<revision>/..."""
    folders = path.absolute().parents
    return [
        (repository.parent / "blobs").resolve()
        for revision, repository in itertools.pairwise(folders)
        if repository.name == "snapshots" and revision.name
    ]


def payload_problem(tensor: onnx.TensorProto, path: Path | None) -> str | None:
    """What is wrong with the elements of `tensor`, None if there are as many as its dims and type ask for.

    Args:
        path: the ONNX file; None for a model in memory, which cannot have external data.
    """
    inline = [field for field in _FIELDS if len(getattr(tensor, field))]
    if not is_external(tensor):
        return _inline_problem(tensor, inline)
    if inline or tensor.raw_data:
        return "has elements both inside and outside the file"
    if path is None:
        return "is external data: verify the file by its path"
    if tensor.data_type == TensorProto.STRING:
        return "holds strings, which cannot be external data"
    try:
        where = span(tensor)
        available = data_file(where.location, path).stat().st_size - where.offset
    except (ValueError, OSError) as error:
        return str(error)
    expected = payload_bytes(tensor)
    if (available if where.length is None else where.length) == expected <= available:
        return None
    stated = max(available if where.length is None else min(where.length, available), 0)
    return f"has {stated} bytes in '{where.location[:200]}', not the {expected} of its type"


def _inline_problem(tensor: onnx.TensorProto, inline: list[str]) -> str | None:
    if tensor.HasField("raw_data"):
        expected, found = payload_bytes(tensor), len(tensor.raw_data)
        if inline or tensor.data_type == TensorProto.STRING:
            return f"has raw data, and {inline[0] if inline else 'strings, which are none'}"
        return None if found == expected else f"has {found} bytes, its dims and type ask for {expected}"
    field = _WIDE_FIELDS.get(tensor.data_type, "int32_data")
    if inline and inline != [field]:
        return f"has {inline[0]}, and its type is kept in {field}"
    count, bits = math.prod(tensor.dims), _BITS.get(tensor.data_type, 8)
    expected = -(-count * bits // 8) if bits < 8 else count
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        expected *= 2
    found = len(getattr(tensor, field))
    return None if found == expected else f"has {found} elements, its dims ask for {expected}"


def array(tensor: onnx.TensorProto, path: Path | None) -> npt.NDArray[Any]:
    """The elements of `tensor`, read from where they lie. *Requires*: `payload_problem` finds none."""
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    return numpy_helper.to_array(embedded(tensor, path))


def embedded(tensor: onnx.TensorProto, path: Path | None) -> onnx.TensorProto:
    """External `tensor` with its elements inside. onnx's own reader takes no link, of which the hub's cache is made."""
    if (problem := payload_problem(tensor, path)) is not None or path is None:
        raise ValueError(f"'{tensor.name}' {problem}")
    where = span(tensor)
    with open(data_file(where.location, path), "rb") as file:
        file.seek(where.offset)
        raw = file.read(payload_bytes(tensor))
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
