"""The tensors that the safetensors files of a directory hold, found from their headers; damage is said here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import INDEX, read_json
from qcompile.checkpoint.files.tensors import DTYPES, FileTensor
from qcompile.errors import CheckpointError
from qcompile.messages import cut

WEIGHTS = "model.safetensors"
_LONGEST_NAME = 255  # of a file
_LONGEST_HEADER = 100_000_000  # as safetensors has it


def open_directory(directory: Path) -> dict[str, FileTensor]:
    """Every tensor of the checkpoint in `directory`, file after file, in the order of their bytes.

    Raises:
        CheckpointError: there are no safetensors, the index cannot be read or names a missing file or tensor, or a file
            is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"{directory} holds no weights: neither {WEIGHTS} nor {INDEX} is there")
    places = _weight_map(index)
    found: dict[str, FileTensor] = {}
    for file in sorted(set(places.values())):
        path = directory / file
        if not path.is_file():
            missing = [name for name, place in places.items() if place == file]
            raise CheckpointError(f"{index} names {file}, which is not there ({missing[0]} and others are in it)")
        held = read_header(path)
        if lost := [name for name, place in places.items() if place == file and name not in held]:
            raise CheckpointError(f"{path} lacks {lost[0]}, which {INDEX} says it holds")
        found.update((name, tensor) for name, tensor in held.items() if places.get(name) == file)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    if outside := [file for file in places.values() if Path(file).name != file or len(file) > _LONGEST_NAME]:
        raise CheckpointError(f"{index} names {cut(outside[0])}, which is no file of this directory")
    return places


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file, in the order of their bytes. Raises `CheckpointError` for a damaged one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated, or no safetensors file: its header is not whole")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is no safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    found = [_entry(path, name, entry, size, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    return {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: tensor.offset)}


def _entry(path: Path, name: str, entry: Any, size: int, data: int) -> FileTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {name} is broken: {entry}") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype}, which is not known here")
    tensor = FileTensor(path, name, DTYPES[dtype], shape, data + start)
    if stop - start != tensor.nbytes:
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)} but has {stop - start} bytes")
    if data + stop > size:
        raise CheckpointError(f"{path} is truncated: {name} ends at byte {data + stop}, the file at {size}")
    return tensor
