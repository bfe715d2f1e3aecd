"""Files of tensors, read as plain data: no pickle runs code, and no small file becomes a large one."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qcompile.capture.plain_tensors import MOST_FACTOR, MOST_UNPACKED, unusable
from qcompile.errors import CalibrationError
from qcompile.messages import first_line, value


def read_tensors(path: Path) -> Any:
    """A tensor, a dict, or a list. Raises `CalibrationError` for other content."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        _check_packing(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
        pytree.tree_leaves(data)  # what contains itself, or is nested too deeply, ends here
    except CalibrationError:
        raise
    except Exception as error:  # each of these libraries has its own
        raise CalibrationError(f"{path} cannot be read as tensors: {first_line(error)}") from error
    if not isinstance(data, torch.Tensor | Mapping | list | tuple):
        raise CalibrationError(f"{path} holds a {type(data).__name__}; a tensor, a dict of tensors or a list is wanted")
    return list(data) if isinstance(data, tuple) else data


def check_tensors(data: Mapping[Any, Any], path: Path) -> None:
    """Refuse names that no input has, and tensors that are not held as plain numbers."""
    for name, tensor in data.items():
        if not isinstance(name, str):
            raise CalibrationError(f"{path} holds {value(name)}, and has to hold tensors by the names of inputs")
        if isinstance(tensor, torch.Tensor) and (problem := unusable(tensor)):
            raise CalibrationError(f"{path}: {value(name)} {problem}")


def _check_packing(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > MOST_UNPACKED and unpacked > MOST_FACTOR * size:
        raise CalibrationError(
            f"{path} has {size} bytes and would be {unpacked} in memory: save it without compression"
        )


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        found = {}
        for name in arrays.files:
            try:
                found[name] = torch.from_numpy(arrays[name])
            except (ValueError, TypeError) as error:  # objects, which would be unpickled; text
                raise CalibrationError(f"{path}: the array {value(name)} is no tensor: {first_line(error)}") from error
        return found
