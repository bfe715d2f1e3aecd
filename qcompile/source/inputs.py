"""Dynamic shapes from the command line's words, in the form that torch.export takes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.errors import SourceError
from qcompile.remedy import meant, with_remedy
from qcompile.source.model import Source

_DYNAMIC = re.compile(
    r"(?P<name>\w+):(?P<axis>-?\d+)(=(?P<dim>[A-Za-z_]\w*)(:(?P<low>\d+):(?P<high>\d+))?)?",
)
_Ranges = dict[str, tuple[int, int]]


def with_dynamic_shapes(source: Source, dynamic: Sequence[str] = (), *, batch: bool = False) -> Source:
    """`source` with the named axes dynamic.

    Args:
        dynamic: each `input:axis=dimension`, such as `input_ids:1=sequence`; axes with one dimension's name have the
            same size. Without `=dimension` it is called `input_axis`; with `:least:largest` after it, such as
            `input_ids:1=sequence:1:512`, it has a range, which models with a table of positions need.
        batch: axis 0 of every input is the dimension `batch`.

    An example of size 1 along a dynamic axis is repeated, since torch.export takes 0 and 1 for constants.

    Raises:
        SourceError: no such input or axis, sizes of one dimension differ, or the source fixes its own shapes.
    """
    if not dynamic and not batch:
        return source
    if isinstance(source.model, ExportedProgram):
        raise SourceError(f"{source.name}: an exported program has its shapes already; export it with dynamic_shapes")
    if source.dynamic_shapes is not None:
        raise SourceError(f"{source.name}: the factory gives dynamic_shapes already; leave out --dynamic")
    inputs = source.inputs
    axes: dict[str, dict[int, str]] = {name: {} for name in inputs}
    if batch:
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                axes[name][0] = "batch"
    ranges: _Ranges = {}
    for text in dynamic:
        name, axis, dim = _parse(text, inputs, ranges)
        axes[name][axis] = dim
    widened = [_widen(value, axes[name]) for name, value in inputs.items()]
    dims = _dims(dict(zip(inputs, widened, strict=True)), axes, ranges)

    _, spec = pytree.tree_flatten((source.args, source.kwargs))
    shapes = [{a: dims[d] for a, d in axes[name].items()} or None for name in inputs]
    args, kwargs = pytree.tree_unflatten(widened, spec)
    shape_args, shape_kwargs = pytree.tree_unflatten(shapes, spec)
    signature = inspect.signature(source.model.forward)
    bound = dict(signature.bind(*shape_args, **shape_kwargs).arguments)
    for name, shape in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD and any(shape.values()):
            raise SourceError(
                f"{', '.join(shape)}: torch.export has no dynamic shapes for what forward takes as **{name}; use a"
                " wrapper whose forward names its inputs"
            )
    return dataclasses.replace(source, args=args, kwargs=kwargs, dynamic_shapes=bound)


def parse_dynamic(text: str) -> re.Match[str]:
    """The parts of `input:axis=dimension:least:largest`. Raises SourceError for another form."""
    match = _DYNAMIC.fullmatch(text)
    if match is None:
        raise SourceError(f"--dynamic {text}: write it as input:axis=dimension, such as input_ids:1=sequence")
    return match


def _parse(text: str, inputs: dict[str, Any], ranges: _Ranges) -> tuple[str, int, str]:
    """(input, axis, dimension); a range goes to `ranges`."""
    match = parse_dynamic(text)
    name, axis = match["name"], int(match["axis"])
    if not isinstance(inputs.get(name), torch.Tensor):
        problem = SourceError(f"--dynamic {text}: there is no input {name!r}; the inputs are {', '.join(inputs)}")
        raise with_remedy(problem, meant(name, inputs))
    rank = inputs[name].ndim
    if not -rank <= axis < rank:
        raise SourceError(f"--dynamic {text}: {name} has {rank} axes, {list(inputs[name].shape)}")
    dim = match["dim"] or f"{name}_{axis % rank}"
    if match["low"] is not None:
        found = int(match["low"]), int(match["high"])
        if found[0] >= found[1] or ranges.setdefault(dim, found) != found:
            raise SourceError(f"--dynamic {text}: a range is :least:largest, the same wherever {dim} is given one")
    return name, axis % rank, dim


def _widen(value: Any, axes: dict[int, str]) -> Any:
    for axis in axes:
        if value.shape[axis] == 1:
            value = torch.cat([value, value], dim=axis)
    return value


def _dims(inputs: dict[str, Any], axes: dict[str, dict[int, str]], ranges: _Ranges) -> dict[str, Any]:
    """One torch.export.Dim for each name; all axes of that name must agree in size."""
    sizes: dict[str, dict[int, str]] = {}
    for name, named in axes.items():
        for axis, dim in named.items():
            sizes.setdefault(dim, {}).setdefault(inputs[name].shape[axis], f"{name}:{axis}")
    for dim, places in sizes.items():
        if len(places) > 1:
            told = ", ".join(f"{place} is {size}" for size, place in places.items())
            raise SourceError(f"--dynamic: axes of the dimension {dim!r} differ in size: {told}")
    return {dim: Dim(dim, min=ranges[dim][0], max=ranges[dim][1]) if dim in ranges else Dim(dim) for dim in sizes}
