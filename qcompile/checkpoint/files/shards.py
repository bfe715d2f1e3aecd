"""Writes `model-0000k-of-0000N.safetensors` and their index, a shard at a time.

The library's own writer wants all tensors of a file in memory. Here a tensor that goes over unchanged is copied from
file to file when its shard is written, so that a shard holds codes and scales only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from qcompile.checkpoint.files.headers import WEIGHTS
from qcompile.checkpoint.files.json_files import INDEX
from qcompile.checkpoint.files.tensors import DTYPES, HeldTensor, Stored
from qcompile.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """`"5GB"`, `"200MB"` or a number of bytes. Raises `CheckpointError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if count < 1:
        raise CheckpointError(f"max_shard_size={size!r}: give a number of bytes, or one with a unit such as '1GB'")
    return count


class ShardWriter:
    """Collects tensors and writes a shard whenever the next ones would make it too large.

    Attributes:
        bytes: of all tensors so far.
    """

    def __init__(self, directory: Path, largest: int) -> None:
        self.directory = directory
        self.largest = largest
        self.bytes = 0
        self._places: dict[str, int] = {}
        self._pending: dict[str, Stored] = {}
        self._shards = 0

    def add(self, tensors: Mapping[str, torch.Tensor | Stored]) -> None:
        """Tensors that belong together; they go into one shard."""
        stored: dict[str, Stored] = {
            name: HeldTensor(name, tensor) if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in tensors.items()
        }
        if twice := [name for name in stored if name in self._places or name in self._pending]:
            raise CheckpointError(f"{twice[0]} would be written twice")
        size = sum(tensor.nbytes for tensor in stored.values())
        if self._pending and sum(t.nbytes for t in self._pending.values()) + size > self.largest:
            self._flush()
        self._pending.update(stored)
        self.bytes += size

    def close(self) -> list[str]:
        """Write what is left, give the shards their names, and write the index; returns the names of all files."""
        if self._pending:
            self._flush()
        if self._shards == 1:
            (self.directory / _part(1)).rename(self.directory / WEIGHTS)
            return [WEIGHTS]
        names = [f"model-{k:05d}-of-{self._shards:05d}.safetensors" for k in range(1, self._shards + 1)]
        for k, name in enumerate(names, 1):
            (self.directory / _part(k)).rename(self.directory / name)
        places = {tensor: names[k - 1] for tensor, k in sorted(self._places.items())}
        content = {"metadata": {"total_size": self.bytes}, "weight_map": places}
        (self.directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return [*names, INDEX]

    def _flush(self) -> None:
        self._shards += 1
        write_file(self.directory / _part(self._shards), self._pending)
        self._places.update(dict.fromkeys(self._pending, self._shards))
        self._pending = {}


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    """One safetensors file, with the metadata that transformers asks for."""
    # wide elements first, as safetensors has it: then each starts at a multiple of its size
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for chunk in _bytes(tensors[name] for name in ordered):
            file.write(chunk)


def _bytes(tensors: Iterator[Stored]) -> Iterator[memoryview]:
    for tensor in tensors:
        yield from tensor.chunks()
