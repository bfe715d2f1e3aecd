"""The tensors of a directory by name, read one at a time, with a record of those that nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.headers import open_directory
from qcompile.checkpoint.files.tensors import FileTensor


class TensorStore:
    """What `open_directory` finds, to be read whole.

    Attributes:
        directory: where they are.
        left: names that `get` has not returned yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors = open_directory(directory)
        self.left = set(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def under(self, prefix: str) -> list[str]:
        """The tensors of the module `prefix`."""
        return [name for name in self._tensors if name.startswith(f"{prefix}.")]

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor. Raises KeyError for one that no file holds."""
        tensor = _read(self._tensors[name])
        self.left.discard(name)
        return tensor

    def later(self, name: str) -> Later:
        """The tensor as transformers takes it: read when it is indexed."""
        return Later(self._tensors[name])


class HeaderStore(TensorStore):
    """Tensors of more than one element are on the meta device: what is known of them without reading them."""

    def get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if math.prod(tensor.shape) == 1:
            return super().get(name)
        self.left.discard(name)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class Later:
    """A tensor that is read by `later[...]`, as slices of safetensors are."""

    def __init__(self, tensor: FileTensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return _read(self._tensor)[index]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


def _read(tensor: FileTensor) -> torch.Tensor:
    if tensor.shape:
        return tensor.rows(0, tensor.shape[0])
    data = bytearray().join(tensor.chunks())
    return torch.frombuffer(data, dtype=tensor.dtype).reshape(())
