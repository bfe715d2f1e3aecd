"""Tensors that are not read yet: in the safetensors files of a directory, or of a model in memory.

Files are read with seek and read, not mapped: pages of a mapping count as memory of the process until it is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from qcompile.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that weights and scales are stored in
_CHUNK = 1 << 24  # bytes


class Shaped(Protocol):
    """A tensor of which no more is known.

    Attributes:
        where: file and name, for messages.
    """

    @property
    def where(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Stored(Shaped, Protocol):
    """A tensor that can be read in parts."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first axis, on the CPU."""

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, row-major and little-endian, some at a time."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def where(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> torch.Tensor:
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        self._read_into(_bytes(data), self.offset + start * row)
        return data.view(self.dtype).view(stop - start, *self.shape[1:])

    def chunks(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_CHUNK, self.nbytes)))
        for start in range(0, self.nbytes, _CHUNK):
            part = buffer[: min(_CHUNK, self.nbytes - start)]
            self._read_into(part, self.offset + start)
            yield part

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{self.where}: the file became shorter while it was read")
                done += count


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory."""

    name: str
    tensor: torch.Tensor

    @property
    def where(self) -> str:
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor.detach()[start:stop].cpu()

    def chunks(self) -> Iterator[memoryview]:
        flat = self.tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            yield _bytes(flat.view(torch.uint8))


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat tensor of bytes."""
    return tensor.numpy().data
