"""`check_archive`: whether a `.pt2` file holds plain data alone, which torch can open without running any of it.

torch.export.load unpickles without restriction what it cannot unpickle otherwise, and evaluates expressions; so all of
it is read before, with torch's own reader of archives, and by rules that are narrower than torch's.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils import _pytree as pytree

from qcompile.compat.torch import PyTorchFileReader
from qcompile.source.pt2.graph_json import check_graph, check_paths

_GRAPH, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_STORED = {
    folder: f"data/{folder}/model_{folder}_config.json" for folder in ("weights", "constants")
}  # what each tensor is called, and which record has its values
_OF_TORCH = re.compile(
    r"\.data/\w+|\.\w+|archive_format|archive_version|byteorder|version|extra/.*|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/(model_\1_config\.json|weight_\d+|tensor_\d+)",
    re.DOTALL,
)
_RECORD = re.compile(r"(weight|tensor)_\d+")
_MOST_SHARED = 1 << 24  # elements of a tensor that is expanded from fewer
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class UnsafeArchive(ValueError):
    """The part that is no plain data."""


def check_archive(path: Path) -> None:
    """Refuse what torch would run or import when it opens `path`, and what would make more of memory than the file has.

    Raises:
        UnsafeArchive: says what it holds.
        RuntimeError, BadZipFile: it is no archive, or a damaged one.
    """
    try:
        _check(path)
    except ValueError as error:
        raise UnsafeArchive(str(error)) from error


def _check(path: Path) -> None:
    reader = PyTorchFileReader(str(path))
    records = _records(reader, path)
    _check_whole(path, records)
    if foreign := [name for name in records if not _OF_TORCH.fullmatch(name)]:
        raise ValueError(f"{foreign[0][:200]!r}, which is no part of a program of plain tensors")
    for folder, listed in _STORED.items():
        for where, meta in _payload(_json(reader, listed)):
            if meta.get("use_pickle"):
                _check_pickle(reader.get_record(f"data/{folder}/{meta['path_name']}"), where, torch.Tensor)
            else:
                _check_sizes(meta, where, records.get(f"data/{folder}/{meta['path_name']}", 0))
    if inputs := reader.get_record(_INPUTS):
        _check_pickle(inputs, "example inputs", (tuple, dict))
    check_graph(_json(reader, _GRAPH))


def _records(reader: Any, file: Path | IO[bytes]) -> dict[str, int]:
    """Sizes of the parts of an archive. torch compresses none; small ones can become very large."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    records = {part.filename.partition("/")[2]: part.file_size for part in parts}
    if sorted(reader.get_all_records()) != sorted(records):  # torch's reader is another than Python's
        raise ValueError("parts that not every reader finds")
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise ValueError("compressed parts, which torch does not write")
    return records


def _check_whole(path: Path, records: dict[str, int]) -> None:
    """Refuse what is not as it was written: torch looks at no checksum."""
    with zipfile.ZipFile(path) as archive:
        if sum(records.values()) > path.stat().st_size:
            raise ValueError("parts that share their bytes")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged[:200]!r} with another checksum than it was written with")


def _json(reader: Any, name: str) -> Any:
    try:
        return json.loads(reader.get_record(name).decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{name}, which is no JSON") from None


def _payload(listed: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    tensors = listed.get("config") if isinstance(listed, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError("no list of its tensors")
    check_paths(tensors)
    for name, meta in tensors.items():
        if not isinstance(meta, dict) or not _RECORD.fullmatch(str(meta.get("path_name"))):
            raise ValueError(f"a broken entry for {name[:80]!r}")
        yield name, meta


def _check_sizes(meta: dict[str, Any], name: str, stored: int) -> None:
    """A tensor has no more elements than its record; one without values is empty."""
    described = meta.get("tensor_meta")
    sizes = described.get("sizes") if isinstance(described, dict) else None
    counts = [size.get("as_int") if isinstance(size, dict) else None for size in sizes or ()]
    if not isinstance(sizes, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"a broken entry for {name[:80]!r}")
    elements = math.prod(count for count in counts if count is not None)
    if elements and not stored:
        raise ValueError(f"{name[:80]!r} without its values")
    if elements > max(stored, _MOST_SHARED):
        raise ValueError(f"{name[:80]!r} with {elements} elements in {stored} bytes")


def _check_pickle(data: bytes, what: str, kinds: Any) -> None:
    """Refuse an object that is more than tensors, numbers, strings and containers: unpickling others runs code."""
    try:
        _records(PyTorchFileReader(io.BytesIO(data)), io.BytesIO(data))
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip, pickle and the classes of tensors each have their own
        name = _GLOBAL.search(str(error))
        held = f"an object of {name[1][:200]!r}" if name else "what is no plain data"
        raise ValueError(f"{held} in its {what[:80]}") from error
    if not isinstance(found, kinds):
        raise ValueError(f"a {type(found).__name__} in its {what[:80]}")
    for leaf in pytree.tree_leaves(found):
        if type(leaf) is torch.Tensor and leaf.numel() > max(_stored(leaf), _MOST_SHARED):
            raise ValueError(f"a tensor of {leaf.numel()} elements without their values in its {what[:80]}")


def _stored(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
