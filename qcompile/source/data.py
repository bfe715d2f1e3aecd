"""What all kinds of calibration data have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qcompile.errors import CalibrationError
from qcompile.source.model import Source

DEFAULT_SAMPLES = 128


class Data(ABC):
    """Calibration data, opened before the model is loaded that it is for.

    Attributes:
        name: what messages call it: the words of the command line.
        notices: what the user should know of it; complete once there are batches.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.notices: list[str] = []

    def __str__(self) -> str:
        return self.name

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Input -> shape of its data, samples on the first axis, as far as it can be told without the model."""
        return {}

    @abstractmethod
    def batches(self, source: Source) -> Iterable[Any]:
        """Batches of the size of the example inputs; the last one can be smaller.

        Raises CalibrationError or SourceError for data that cannot be read or do not fit the inputs.
        """


class LazyBatches(Sequence[Any]):
    """Batches that are made when they are asked for: no more than one has to be in memory."""

    def __init__(self, make: Callable[[int, int], Any], samples: int, size: int) -> None:
        """`make` gives the batch of samples `start` to `stop`."""
        self._make, self._samples, self._size = make, samples, size

    def __len__(self) -> int:
        return -(-self._samples // self._size)

    def __getitem__(self, index: Any) -> Any:
        start = range(0, self._samples, self._size)[index]
        return self._make(start, min(start + self._size, self._samples))


def tensor_inputs(source: Source) -> dict[str, torch.Tensor]:
    """The inputs of the model that calibration data are given for."""
    return {name: value for name, value in source.inputs.items() if isinstance(value, torch.Tensor)}


def batch_size(wanted: Mapping[str, torch.Tensor]) -> int:
    return next((value.shape[0] for value in wanted.values() if value.ndim), 1)


def as_batch(source: Source, tensors: Mapping[str, Any], data: str) -> Any:
    """One batch of `source`: the tensors by name, cast as `fitting` does, and of other inputs the examples."""
    wanted = tensor_inputs(source)
    dims = source.dims
    fit = {name: fitting(name, tensors[name], example, dims[name], data) for name, example in wanted.items()}
    return source.batch([fit.get(name, value) for name, value in source.inputs.items()])


def fitting(name: str, tensor: Any, example: torch.Tensor, dims: Sequence[int | str], data: str) -> torch.Tensor:
    """`tensor` in the dtype of the example, where that changes no meaning.

    Args:
        dims: the axes of the input, with a name for each that is dynamic; the first one is the samples.
        data: what the message calls the data.
    """
    found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != example.ndim:
        raise CalibrationError(f"{data}: {name} is {found}, but the model takes {_shown(dims)} (samples first)")
    differ = [
        f"--dynamic {name}:{axis}"
        for axis, (size, dim) in enumerate(zip(tensor.shape, dims, strict=True))
        if axis and isinstance(dim, int) and size != dim
    ]
    if differ:
        raise CalibrationError(
            f"{data}: {name} is {found}, but the model was captured with {_shown(dims)} (samples first): give data of"
            f" that size, or let it vary with {' '.join(differ)}"
        )
    if tensor.is_floating_point() != example.is_floating_point():
        raise CalibrationError(
            f"{data}: {name} is {tensor.dtype}, but the model takes {example.dtype}: prepare the data as for the model"
        )
    return tensor.to(example.dtype)


def _shown(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, dims))}]"
