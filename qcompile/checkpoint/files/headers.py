"""The tensors that the safetensors files of a directory hold, found from their headers; damage is said here.

A header is believed by the rules of the safetensors library: integers, bounds, no overlaps or holes; and nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from qcompile.checkpoint.files.json_files import INDEX, read_json
from qcompile.checkpoint.files.links import check_inside
from qcompile.checkpoint.files.tensors import DTYPES, FileTensor
from qcompile.errors import CheckpointError
from qcompile.messages import cut

WEIGHTS = "model.safetensors"
_LONGEST_NAME = 255  # of a file
_LONGEST_HEADER = 100_000_000  # as safetensors has it


def open_directory(directory: Path) -> dict[str, FileTensor]:
    """Every tensor of the checkpoint in `directory`, file after file, in the order of their bytes.

    Raises:
        CheckpointError: there are no safetensors, the index cannot be read or names a missing file or tensor, a file is
            damaged, or a link that leads out of the directory.
    """
    if (directory / WEIGHTS).is_file():
        check_inside(directory / WEIGHTS, directory)
        return read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"{directory} holds no weights: neither {WEIGHTS} nor {INDEX} is there")
    places = weight_map(index)
    found: dict[str, FileTensor] = {}
    for file in sorted(set(places.values())):
        path = directory / file
        if not path.is_file():
            missing = [name for name, place in places.items() if place == file]
            raise CheckpointError(
                f"{index} names {file}, which is not there ({_shown(missing[0])} and others are in it)"
            )
        check_inside(path, directory)
        held = read_header(path)
        if lost := [name for name, place in places.items() if place == file and name not in held]:
            raise CheckpointError(f"{path} lacks {_shown(lost[0])}, which {INDEX} says it holds")
        found.update((name, tensor) for name, tensor in held.items() if places.get(name) == file)
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index. Raises `CheckpointError` for a broken one, and for files outside its directory."""
    check_inside(index, index.parent)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    if outside := [file for file in places.values() if not _is_name(file)]:
        raise CheckpointError(f"{index} names {_shown(outside[0])}, which is no file of this directory")
    return places


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file, in the order of their bytes. Raises `CheckpointError` for a damaged one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated, or no safetensors file: its header is not whole")
        header = _object(path, file.read(length))
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text(metadata):
        raise CheckpointError(f"{path} is no safetensors file: its __metadata__ is not text by name")
    found = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_places(path, found, 8 + length, size)
    return {tensor.name: tensor for tensor in found}


def _object(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        entries = list(pairs)
        if len(found := dict(entries)) != len(entries):
            raise ValueError("a name is there twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    return header


def _is_text(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _shown(found: object) -> str:
    return cut(str(found), 200)


def _is_name(file: str) -> bool:
    return Path(file).name == file and file.isprintable() and len(file) <= _LONGEST_NAME


def _entry(path: Path, name: str, entry: Any, data: int) -> FileTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: the header's entry for {_shown(name)} is broken: {_shown(entry)}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {_shown(name)} has the dtype {_shown(dtype)}, which is not known here")
    tensor = FileTensor(path, name, DTYPES[dtype], tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointError(
            f"{path}: {_shown(name)} is {dtype} {_shown(shape)} but has {offsets[1] - offsets[0]} bytes"
        )
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Integers as the library has them, of 64 bits; JSON's true is 1 in Python."""
    return isinstance(value, list) and all(type(part) is int and 0 <= part < 1 << 64 for part in value)


def _check_places(path: Path, tensors: list[FileTensor], start: int, size: int) -> None:
    """Each starts where the one before it ends, and the last ends with the file."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {_shown(tensor.name)} starts at byte {tensor.offset}, and what is before it ends at {end}"
            )
        end += tensor.nbytes
        if end > size:
            raise CheckpointError(f"{path} is truncated: {_shown(tensor.name)} ends at byte {end}, the file at {size}")
    if end != size:
        raise CheckpointError(f"{path}: its tensors end at byte {end}, and the file at {size}")
