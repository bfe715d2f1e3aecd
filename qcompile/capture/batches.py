"""Batches in the forms that users have them, as the flat inputs of a captured program."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.carried import initial_state
from passes.graph import dtype, shape, val
from qcompile.capture.batch_forms import dynamic_shapes_for, rearranged
from qcompile.capture.inputs import laid_out
from qcompile.capture.plain_tensors import unusable
from qcompile.errors import CalibrationError
from qcompile.messages import cut


class PlacedBatches(Sequence[Any]):
    """Batches that know what they were made of, so that an error names a file and not a number alone.

    Attributes:
        notices: what the user should know of them.
    """

    notices: Sequence[str] = ()

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the batch comes from: `texts.jsonl, line 12`."""


def batch_count(batches: object) -> int | None:
    """How many there are, where that is known before they come."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of a stream, which has a length in name only
        return None


def flatten_batch(batch: Any, program: ExportedProgram, name: str = "the batch") -> list[Any]:
    """The flat user inputs of `program` for one batch in any of the accepted forms; `name` is for messages.

    A model that was captured with both takes `(args, kwargs)`. A batch without state begins with that of the program.
    """
    example = program.example_inputs
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise CalibrationError(
            f"{name} is a {kind_of(batch)}; a batch is a tuple of arguments, a dict of keyword arguments, or one tensor"
        )
    if example is not None and all(example) and len(args) == 2 and isinstance(args[1], Mapping):
        given, keywords = args
        args, kwargs = given if isinstance(given, (tuple, list)) else (given,), keywords
    kwargs = {**kwargs, **{key: value for key, value in initial_state(program).items() if key not in kwargs}}
    if example is not None and kwargs:
        kwargs = {name: kwargs[name] for name in example[1] if name in kwargs} | dict(kwargs)
    try:
        flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    except RecursionError as error:
        raise CalibrationError(f"{name} is nested too deeply, or contains itself") from error
    if spec != program.call_spec.in_spec:
        raise CalibrationError(
            f"{name} is called as {_describe(args, kwargs)}, but the model was captured as"
            f" {_describe(*example) if example else program.call_spec.in_spec}"
            + ("; give batches as (args, kwargs)" if example is not None and all(example) else "")
            + (f"; give\n  {better}" if (better := rearranged(args, kwargs, program)) else "")
        )
    return flat if example is None else laid_out(flat, pytree.tree_leaves(example))


def _describe(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    words = [type(a).__name__ for a in args] + [f"{name}={type(a).__name__}" for name, a in kwargs.items()]
    return cut(f"model({', '.join(words)})", 1_000)


def kind_of(value: object) -> str:
    return type(value).__name__


@dataclass(frozen=True)
class Piece:
    """What one run of the captured graph takes.

    Attributes:
        inputs: flat, of the captured sizes.
        weight: what each sample counts in a sum over all pieces of a batch: 1/n where `inputs` has every sample n
            times. In a piece that was filled up with other samples it is 1, as if they were its own.
    """

    inputs: list[Any]
    weight: float = 1.0


def pieces(
    inputs: list[Any],
    placeholders: list[Node],
    name: str,
    *,
    evenly: bool = False,
    program: ExportedProgram | None = None,
) -> Iterator[Piece]:
    """`inputs` as they are, or in pieces where all that differs from what was captured is the size of the batch axis.

    The last piece is filled up with samples from the beginning: a largest value does not change if it sees a sample
    again. `evenly` is for sums: what is left over is cut into divisors of the captured size, and each piece has all of
    its samples equally often, so that `weight` makes up for that wherever the graph puts its batch axis. `program` is
    for messages.
    """
    other: list[tuple[int, torch.Tensor]] = []
    sizes: set[tuple[int, int]] = set()
    dynamic = partial(dynamic_shapes_for, inputs, placeholders, program) if program is not None else str
    for i, (value, placeholder) in enumerate(zip(inputs, placeholders, strict=True)):
        _check_fit(value, placeholder, name, dynamic)
        if isinstance(value, torch.Tensor) and value.ndim and _differ(value.shape[0], shape(placeholder)[0]):
            other.append((i, value))
            sizes.add((value.shape[0], shape(placeholder)[0]))
    if not sizes:
        yield Piece(inputs)
        return
    if len(sizes) > 1 or 0 in next(iter(sizes)):
        found = ", ".join(f"{size} where {captured} was captured" for size, captured in sorted(sizes))
        raise CalibrationError(f"{name} has tensors of different batch sizes, or of none: {found}")
    ((size, captured),) = sizes
    for rows, weight in _cuts(size, captured, evenly):
        cut = list(inputs)
        for i, tensor in other:
            cut[i] = tensor.index_select(0, rows.to(tensor.device))
        yield Piece(cut, weight)


def _cuts(size: int, captured: int, evenly: bool) -> Iterator[tuple[torch.Tensor, float]]:
    """Which of `size` samples are in each piece of `captured`, and what they count."""
    start = 0
    while start < size:
        count = min(captured, size - start)
        if not evenly:
            yield torch.arange(start, start + captured) % size, 1.0
        else:
            count = next(n for n in range(count, 0, -1) if captured % n == 0)
            yield start + torch.arange(captured) % count, count / captured
        start += count


def _check_fit(value: object, placeholder: Node, name: str, dynamic: Callable[[], str]) -> None:
    """Raises unless `value` has the dtype that was captured, and the shape, the first axis aside.

    `dynamic` says with which `dynamic_shapes` it would fit.
    """
    if not isinstance(value, torch.Tensor) or not isinstance(val(placeholder), torch.Tensor):
        if type(value) is not type(val(placeholder)) and not isinstance(val(placeholder), torch.SymInt):
            captured_kind = kind_of(val(placeholder))
            raise CalibrationError(
                f"{name}: {placeholder.name} is a {kind_of(value)}, but the model was captured with a {captured_kind}"
            )
        return
    if problem := unusable(value):
        raise CalibrationError(f"{name}: {placeholder.name} {problem}")
    captured = shape(placeholder)
    if value.dtype != dtype(placeholder):
        raise CalibrationError(
            f"{name}: {placeholder.name} is {value.dtype}, but the model was captured with {dtype(placeholder)}"
        )
    if value.ndim != len(captured) or any(map(_differ, value.shape[1:], captured[1:])):
        raise CalibrationError(
            f"{name}: {placeholder.name} has shape {list(value.shape)}, but the model was captured with"
            f" [{', '.join(map(str, captured))}]; give batches of that shape, or capture with dynamic_shapes"
            + (f":\n  {told}" if value.ndim == len(captured) and (told := dynamic()) else "")
        )


def _differ(size: int, captured: int | torch.SymInt) -> bool:
    return isinstance(captured, int) and size != captured
