"""Calibration data from a file, from a function, or made up, as batches for `qcompile.quantize`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.errors import CalibrationError, SourceError
from qcompile.source.load import FUNCTION, call_function, import_function
from qcompile.source.model import Source

RANDOM = "random"
_RANDOM_BATCHES = 4
_SUFFIXES = (".pt", ".pth", ".safetensors", ".npz", ".npy")


def load_calibration(text: str, source: Source) -> Iterable[Any]:
    """Batches for calibrating `source`.

    Args:
        text: a `.safetensors`, `.npz` or `.pt` file with a tensor for each input, by name, whose first axis is the
            samples; a `.npy` or `.pt` file with the one tensor of a model with one input; a `.pt` file with a list of
            batches; `package.module:function`, which returns an iterable of batches; or `random`, made-up data that
            is good for nothing but trying out.

    Returns:
        Batches of the size of the example inputs; the last one can be smaller.

    Raises:
        CalibrationError: the file cannot be read or does not fit the inputs.
        SourceError: the function cannot be found or fails.
    """
    check_calibration(text)
    path = Path(text)
    if text == RANDOM:
        return _made_up(source)
    if path.suffix in _SUFFIXES:
        data = _read(path)
        return data if isinstance(data, list) else _batches(data, source, path)
    result = call_function(text)
    if isinstance(result, Mapping | torch.Tensor) or not isinstance(result, Iterable):
        raise SourceError(f"{text} returned a {type(result).__name__}; it has to return an iterable of batches")
    return result


def check_calibration(text: str) -> None:
    """Raise, before a model is loaded, what `load_calibration` would for a file or a function that is not there."""
    path = Path(text)
    if text == RANDOM:
        return
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise CalibrationError(f"there is no calibration file {path}")
    elif FUNCTION.fullmatch(text) and not path.exists():
        import_function(text)
    else:
        raise CalibrationError(
            f"calibration data {text!r} is no file that can be read: give {', '.join(_SUFFIXES)},"
            f" package.module:function, or {RANDOM!r} to try out without data"
        )


def _read(path: Path) -> Any:
    """A tensor, a dict of tensors by name, or a list of batches."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each of these libraries has its own
        text = str(error).strip().splitlines()
        raise CalibrationError(
            f"{path} cannot be read as tensors: {text[0] if text else type(error).__name__}"
        ) from error
    if not isinstance(data, torch.Tensor | Mapping | list | tuple):
        raise CalibrationError(f"{path} holds a {type(data).__name__}; a tensor, a dict of tensors or a list is wanted")
    return list(data) if isinstance(data, tuple) else data


def _batches(data: Any, source: Source, path: Path) -> list[Any]:
    """Cut tensors with all samples into batches of the sizes that the example inputs have."""
    inputs = source.inputs
    wanted = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if isinstance(data, torch.Tensor):
        if len(wanted) != 1:
            raise CalibrationError(f"{path} holds one tensor, but the model has the inputs {', '.join(wanted)}")
        data = {next(iter(wanted)): data}
    _check_names(set(data), wanted, path)
    pieces = {
        name: _cut(name, _fitting(name, data[name], example, path), example, path) for name, example in wanted.items()
    }
    counts = {name: len(cut) for name, cut in pieces.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} has {data[name].shape[0]}" for name in counts)
        raise CalibrationError(f"{path}: the tensors have different numbers of samples: {told}")
    total = next(iter(counts.values()))
    return [
        source.batch([pieces[name][i] if name in pieces else value for name, value in inputs.items()])
        for i in range(total)
    ]


def _check_names(found: set[str], wanted: Mapping[str, Any], path: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else ""
        extra = f"holds {', '.join(unknown)}, which the model does not take" if unknown else ""
        raise CalibrationError(
            f"{path} {' and '.join(filter(None, (lacks, extra)))}; the model's inputs are {', '.join(wanted)}"
        )


def _fitting(name: str, tensor: Any, example: torch.Tensor, path: Path) -> torch.Tensor:
    """`tensor` in the dtype of the example, where that changes no meaning."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != example.ndim:
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CalibrationError(f"{path}: {name} is {shape}, but the model takes {list(example.shape)} (samples first)")
    if tensor.is_floating_point() != example.is_floating_point():
        raise CalibrationError(
            f"{path}: {name} is {tensor.dtype}, but the model takes {example.dtype}: prepare the data as for the model"
        )
    return tensor.to(example.dtype)


def _cut(name: str, tensor: torch.Tensor, example: torch.Tensor, path: Path) -> list[torch.Tensor]:
    size = example.shape[0] if example.ndim else 1
    if not example.ndim:
        return [tensor]
    if tensor.shape[0] < size:
        raise CalibrationError(f"{path}: {name} has {tensor.shape[0]} samples, fewer than one batch of {size}")
    return [tensor[start : start + size] for start in range(0, tensor.shape[0], size)]


def _made_up(source: Source) -> list[Any]:
    """Normal floats with mean and deviation of the example, integers in its range; the seed is fixed."""
    random = torch.Generator().manual_seed(0)
    return [source.batch([_like(value, random) for value in source.inputs.values()]) for _ in range(_RANDOM_BATCHES)]


def _like(value: Any, random: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or not value.numel() or value.dtype == torch.bool or value.is_complex():
        return value
    if not value.is_floating_point():
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, value.shape, generator=random).to(value.dtype)
    data = value.double()
    if not bool(torch.isfinite(data).all()):
        return value  # a mask to be added, whose pattern is all that it says
    deviation = float(data.std(correction=0)) or 1.0
    return (torch.randn(value.shape, generator=random) * deviation + float(data.mean())).to(value.dtype)
