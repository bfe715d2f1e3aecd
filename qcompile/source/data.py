"""What all kinds of calibration data have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qcompile.capture.batches import PlacedBatches
from qcompile.errors import CalibrationError
from qcompile.remedy import Remedy, with_remedy
from qcompile.source.examples import TEXT_INPUTS
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


class LazyBatches(PlacedBatches):
    """Batches that are made when they are asked for: no more than one has to be in memory."""

    def __init__(
        self,
        make: Callable[[int, int], Any],
        samples: int,
        size: int,
        place: Callable[[int, int], str],
        notices: Sequence[str] = (),
    ) -> None:
        """`make` gives the batch of samples `start` to `stop`, `place` where they are from."""
        self._make, self._samples, self._size, self._place = make, samples, size, place
        self.notices = notices

    def __len__(self) -> int:
        return -(-self._samples // self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._make(*self._ends(index))

    def place(self, index: int) -> str:
        return self._place(*self._ends(index))

    def _ends(self, index: int) -> tuple[int, int]:
        start = range(0, self._samples, self._size)[index]
        return start, min(start + self._size, self._samples)


class ListedBatches(PlacedBatches):
    """Batches that are there."""

    def __init__(self, batches: Sequence[Any], name: str, notices: Sequence[str] = ()) -> None:
        self._batches, self._name, self.notices = batches, name, notices

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def place(self, index: int) -> str:
        return self._name


def tensor_inputs(source: Source) -> dict[str, torch.Tensor]:
    """The inputs of the model that calibration data are given for."""
    return {name: value for name, value in source.inputs.items() if isinstance(value, torch.Tensor)}


def batch_size(wanted: Mapping[str, torch.Tensor]) -> int:
    return next((value.shape[0] for value in wanted.values() if value.ndim), 1)


def as_batch(source: Source, tensors: Mapping[str, Any], data: str) -> Any:
    """One batch of `source`: the tensors as `fitting` makes them, and of other inputs the examples."""
    fit = fitting(source, tensors, data)
    return source.batch([fit.get(name, value) for name, value in source.inputs.items()])


def fitting(source: Source, tensors: Mapping[str, Any], data: str) -> dict[str, torch.Tensor]:
    """The tensors that the model takes, in its dtypes, where that changes no meaning.

    Args:
        tensors: by input, samples on the first axis.
        data: what messages call them.

    Raises:
        CalibrationError: a tensor has another number of axes, another size than was captured, or another kind of dtype.
    """
    dims, wanted = source.dims, tensor_inputs(source)
    for name, example in wanted.items():
        tensor = tensors[name]
        found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != example.ndim:
            raise CalibrationError(
                f"{data}: {name} is {found}, but the model takes {_shown(dims[name])} (samples first)"
            )
        kinds = [(one.is_floating_point(), one.is_complex()) for one in (tensor, example)]
        if kinds[0] != kinds[1]:
            raise CalibrationError(
                f"{data}: {name} is {tensor.dtype}, but the model takes {example.dtype}: prepare the data as for"
                " the model"
            )
    _check_sizes(source, {name: tensors[name] for name in wanted}, data)
    return {name: tensors[name].to(example.dtype) for name, example in wanted.items()}


def _check_sizes(source: Source, tensors: Mapping[str, torch.Tensor], data: str) -> None:
    differ = {
        (name, axis): (dim, tensor.shape[axis])
        for name, tensor in tensors.items()
        for axis, dim in enumerate(source.dims[name])
        if axis and isinstance(dim, int) and tensor.shape[axis] != dim
    }
    if differ:
        name = next(iter(differ))[0]
        problem = CalibrationError(
            f"{data}: {name} is {list(tensors[name].shape)}, but the model was captured with"
            f" {_shown(source.dims[name])} (samples first): give data of that size, or capture with the size of the"
            " data, or with a dynamic one"
        )
        raise with_remedy(problem, _other_sizes(source, differ))


def _other_sizes(source: Source, differ: Mapping[tuple[str, int], tuple[int, int]]) -> Remedy:
    """Axes that differ in the same way are one dimension; of text in a directory it is the length."""
    if source.program is not None:
        return Remedy()  # has its sizes for good
    pairs = dict.fromkeys(differ.values())
    if (
        hasattr(source.model, "main_input_name")
        and len(pairs) == 1
        and {name for name, _ in differ} <= set(TEXT_INPUTS)
    ):
        return Remedy(options={"--sequence": (str(next(iter(pairs))[1]),)})
    dims = {pair: f"size_{i}" for i, pair in enumerate(pairs)}
    return Remedy(options={"--dynamic": tuple(f"{n}:{axis}={dims[pair]}" for (n, axis), pair in differ.items())})


def _shown(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, dims))}]"
