"""Calibration data in files of tensors: .safetensors, .npz, .npy and .pt."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompile.capture.plain_tensors import unusable
from qcompile.errors import CalibrationError
from qcompile.messages import some
from qcompile.remedy import Remedy, with_remedy
from qcompile.source.data import Data, LazyBatches, ListedBatches, batch_size, fitting, tensor_inputs
from qcompile.source.model import Source
from qcompile.source.tensor_reading import check_tensors, read_tensors

SUFFIXES = (".pt", ".pth", ".safetensors", ".npz", ".npy")


class TensorFile(Data):
    """A file with a tensor for each input, by name, whose first axis is the samples; with the one tensor of a model
    that has one input; or a `.pt` file with a list of batches."""

    def __init__(self, path: Path, samples: int | None) -> None:
        """`samples`: take the first so many; None takes all."""
        super().__init__(str(path))
        if not path.is_file():
            raise CalibrationError(f"there is no calibration file {path}")
        self.path, self.samples = path, samples

    def shapes(self) -> dict[str, Sequence[int]]:
        data = self._content[0] if isinstance(self._content, list) and self._content else self._content
        found = data if isinstance(data, Mapping) else {}
        return {
            str(name): tensor.shape
            for name, tensor in found.items()
            if isinstance(tensor, torch.Tensor) and not unusable(tensor)
        }

    def batches(self, source: Source) -> Iterable[Any]:
        if isinstance(self._content, list):
            content = self._content
            listed = content if self.samples is None else list(first_samples(content, self.samples))
            return ListedBatches(listed, self.name)
        return self._cut(self._content, source)

    @cached_property
    def _content(self) -> Any:
        """A tensor, a dict of tensors by name, or a list of batches."""
        return read_tensors(self.path)

    def _cut(self, data: Any, source: Source) -> LazyBatches:
        """Cut tensors with all samples into batches of the sizes that the example inputs have."""
        inputs, wanted = source.inputs, tensor_inputs(source)
        if isinstance(data, torch.Tensor):
            if len(wanted) != 1:
                raise CalibrationError(
                    f"{self.name} holds one tensor, but the model has the inputs {', '.join(wanted)}"
                )
            data = {next(iter(wanted)): data}
        check_tensors(data, self.path)
        _check_names(data, wanted, self.path)
        fit = fitting(source, data, self.name)
        total, size = self._count(fit), batch_size(wanted)
        if total < size:
            raise CalibrationError(f"{self.name} has {total} samples, fewer than one batch of {size}")
        return LazyBatches(
            lambda start, stop: source.batch([_rows(fit.get(n, value), start, stop) for n, value in inputs.items()]),
            total,
            size,
            lambda start, stop: f"{self.name}, samples {start} to {stop - 1}",
        )

    def _count(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """How many samples are taken."""
        counts = {name: len(tensor) for name, tensor in tensors.items() if tensor.ndim}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise CalibrationError(f"{self.name}: the tensors have different numbers of samples: {told}")
        total = next(iter(counts.values()), 1)
        return total if self.samples is None else min(total, self.samples)


def _rows(value: Any, start: int, stop: int) -> Any:
    return value[start:stop] if isinstance(value, torch.Tensor) and value.ndim else value


def first_samples(batches: Iterable[Any], samples: int) -> Iterable[Any]:
    """The first batches, until they hold `samples`."""
    found = 0
    for batch in batches:
        if found >= samples:
            return
        yield batch
        tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim)
        found += next((len(tensor) for tensor in tensors), 1)


def _check_names(data: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    missing, unknown = sorted(wanted.keys() - data.keys()), sorted(data.keys() - wanted.keys())
    if missing or unknown:
        lacks = f"lacks {some(missing)}" if missing else ""
        extra = f"holds {some(unknown)}, which the model does not take" if unknown else ""
        problem = CalibrationError(
            f"{path} {' and '.join(filter(None, (lacks, extra)))}; the model's inputs are {', '.join(wanted)}"
        )
        raise with_remedy(problem, _renamed(data, wanted, path))


_READ_WRITE = {
    ".npz": ("import numpy as np", "dict(np.load({}))", "np.savez({}, **d)"),
    ".safetensors": ("from safetensors.torch import load_file, save_file", "load_file({})", "save_file(d, {})"),
    ".pt": ("import torch", "torch.load({})", "torch.save(d, {})"),
}


def _renamed(data: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], path: Path) -> Remedy:
    """A file with the names of the model, if it is clear which is which: by their number of axes and kind of dtype."""
    missing = [name for name in wanted if name not in data]
    spare = [name for name in data if name not in wanted]
    pairs = {}
    for name in missing:
        like = [other for other in spare if _alike(data[other], wanted[name])]
        if len(like) != 1 or path.suffix not in _READ_WRITE:
            return Remedy()
        pairs[name] = like[0]
        spare.remove(like[0])
    new = path.with_stem(f"{path.stem}-renamed")
    imports, read, write = _READ_WRITE[path.suffix]
    moves = [f"d[{name!r}] = d.pop({other!r})" for name, other in pairs.items()]
    moves += [f"d.pop({other!r})" for other in spare]
    lines = [imports, f"d = {read.format(repr(str(path)))}", *moves, write.format(repr(str(new)))]
    return Remedy(first=f"python -c {shlex.quote('; '.join(lines))}", options={"--calibration": (str(new),)})


def _alike(tensor: Any, example: torch.Tensor) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.ndim == example.ndim
        and tensor.is_floating_point() == example.is_floating_point()
    )
