"""Batches in the forms that users have them, as the flat inputs of a captured program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.graph import dtype, shape, val
from qcompile.errors import CalibrationError


def flatten_batch(batch: Any, program: ExportedProgram, name: str = "the batch") -> list[Any]:
    """The flat user inputs of `program` for one batch in any of the accepted forms; `name` is for messages."""
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise CalibrationError(
            f"{name} is a {kind_of(batch)}; a batch is a tuple of arguments, a dict of keyword arguments, or one tensor"
        )
    example = program.example_inputs
    if example is not None and kwargs:
        kwargs = {name: kwargs[name] for name in example[1] if name in kwargs} | dict(kwargs)
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec != program.call_spec.in_spec:
        raise CalibrationError(
            f"{name} is called as {_describe(args, kwargs)}, but the model was captured as"
            f" {_describe(*example) if example else program.call_spec.in_spec}"
        )
    return flat


def _describe(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    words = [type(a).__name__ for a in args] + [f"{name}={type(a).__name__}" for name, a in kwargs.items()]
    return f"model({', '.join(words)})"


def kind_of(value: object) -> str:
    return type(value).__name__


def pieces(inputs: list[Any], placeholders: list[Node], name: str) -> Iterator[list[Any]]:
    """`inputs` as they are, or in pieces where all that differs from what was captured is the size of the batch axis.

    The last piece is filled up with samples from the beginning: an amax does not change if it sees a sample again.
    """
    other: list[tuple[int, torch.Tensor]] = []
    sizes: set[tuple[int, int]] = set()
    for i, (value, placeholder) in enumerate(zip(inputs, placeholders, strict=True)):
        _check_fit(value, placeholder, name)
        if isinstance(value, torch.Tensor) and value.ndim and _differ(value.shape[0], shape(placeholder)[0]):
            other.append((i, value))
            sizes.add((value.shape[0], shape(placeholder)[0]))
    if not sizes:
        yield inputs
        return
    if len(sizes) > 1 or 0 in next(iter(sizes)):
        found = ", ".join(f"{size} where {captured} was captured" for size, captured in sorted(sizes))
        raise CalibrationError(f"{name} has tensors of different batch sizes, or of none: {found}")
    ((size, captured),) = sizes
    for start in range(0, size, captured):
        rows = torch.arange(start, start + captured) % size
        cut = list(inputs)
        for i, tensor in other:
            cut[i] = tensor.index_select(0, rows.to(tensor.device))
        yield cut


def _check_fit(value: object, placeholder: Node, name: str) -> None:
    """Raises unless `value` has the dtype that was captured, and the shape, the first axis aside."""
    if not isinstance(value, torch.Tensor) or not isinstance(val(placeholder), torch.Tensor):
        if type(value) is not type(val(placeholder)) and not isinstance(val(placeholder), torch.SymInt):
            captured_kind = kind_of(val(placeholder))
            raise CalibrationError(
                f"{name}: {placeholder.name} is a {kind_of(value)}, but the model was captured with a {captured_kind}"
            )
        return
    captured = shape(placeholder)
    if value.dtype != dtype(placeholder):
        raise CalibrationError(
            f"{name}: {placeholder.name} is {value.dtype}, but the model was captured with {dtype(placeholder)}"
        )
    if value.ndim != len(captured) or any(map(_differ, value.shape[1:], captured[1:])):
        raise CalibrationError(
            f"{name}: {placeholder.name} has shape {list(value.shape)}, but the model was captured with"
            f" [{', '.join(map(str, captured))}]; capture with dynamic_shapes, or give batches of that shape"
        )


def _differ(size: int, captured: int | torch.SymInt) -> bool:
    return isinstance(captured, int) and size != captured
