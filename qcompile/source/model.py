"""A model with example inputs, and the names that its inputs go by."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.report.record import record_of


@dataclass(frozen=True)
class Source:
    """What `qcompile.quantize` needs of a model.

    Attributes:
        model: a module, or a program that torch.export made.
        args, kwargs: example inputs; of a program, those that it was exported with.
        dynamic_shapes: as in `torch.export.export`, None for static shapes.
        name: what to call it in a report.
    """

    model: torch.nn.Module | ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    name: str = "model"

    @property
    def inputs(self) -> dict[str, Any]:
        """Flat example inputs by name, in order: parameters of `forward`, with `_0` or `_key` for parts of one."""
        flat, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        if isinstance(self.model, ExportedProgram):
            names = [str(name) for name in self.model.graph_signature.user_inputs]
            if len(names) == len(flat):
                return {name: value for name, (_, value) in zip(names, flat, strict=True)}
        parameters = self._positional_names()
        return {_name(path, parameters): value for path, value in flat}

    @property
    def example_batch(self) -> Any:
        """The example inputs as one calibration batch."""
        return self.batch(list(self.inputs.values()))

    @property
    def dims(self) -> dict[str, list[int | str]]:
        """Input -> its dimensions, with a name for each that is dynamic. Inputs that are no tensors are left out."""
        if isinstance(self.model, ExportedProgram):
            shapes = {n.name: getattr(n.meta.get("val"), "shape", None) for n in self.model.graph.nodes}
            found = {name: shapes.get(name) for name in self.inputs}
            names = record_of(self.model).dimensions
            return {n: [_dim(size, names) for size in shape] for n, shape in found.items() if shape is not None}
        dims: dict[str, list[int | str]] = {
            name: list(value.shape) for name, value in self.inputs.items() if isinstance(value, torch.Tensor)
        }
        for name, axes in self._dynamic_axes().items():
            for axis, dim in axes.items():
                if name in dims and dim is not None and not isinstance(dim, int):
                    dims[name][axis] = str(getattr(dim, "__name__", f"{name}_{axis}"))
        return dims

    @property
    def program(self) -> ExportedProgram | None:
        """The model if it is a program that was exported already."""
        return self.model if isinstance(self.model, ExportedProgram) else None

    def _dynamic_axes(self) -> dict[str, dict[int, Any]]:
        """Input -> what `dynamic_shapes` says of its axes; its tree is that of the arguments by parameter."""
        if self.dynamic_shapes is None or isinstance(self.model, ExportedProgram):
            return {}
        _, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(list(self.inputs), spec)
        arguments = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        found = {}
        for path, name in pytree.tree_flatten_with_path(dict(arguments))[0]:
            axes = _follow(self.dynamic_shapes, list(arguments), path)
            if isinstance(axes, Mapping | list | tuple):
                found[name] = dict(axes) if isinstance(axes, Mapping) else dict(enumerate(axes))
        return found

    def batch(self, flat: list[Any]) -> Any:
        """Flat inputs in the order of `inputs` as one calibration batch: arguments, keywords, or `(args, kwargs)`."""
        _, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(flat, spec)
        return (args, kwargs) if args and kwargs else kwargs or args

    def _positional_names(self) -> list[str]:
        if isinstance(self.model, ExportedProgram):
            return []
        names: list[str] = []
        for parameter in inspect.signature(self.model.forward).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                return names + [f"{parameter.name}_{i}" for i in range(len(self.args) - len(names))]
            names.append(parameter.name)
        return names


def _dim(size: Any, names: Mapping[str, str]) -> int | str:
    """A size, or what files call a dynamic one."""
    return size if isinstance(size, int) else re.sub(r"[A-Za-z_]\w*", lambda s: names.get(s[0], s[0]), str(size))


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """`path` leads into (args, kwargs)."""
    keys = _keys(path)
    if keys[0] == 0:
        keys[1] = parameters[keys[1]] if keys[1] < len(parameters) else f"input_{keys[1]}"
    return "_".join(map(str, keys[1:]))


def _follow(shapes: Any, parameters: list[str], path: tuple[Any, ...]) -> Any:
    """What `shapes` holds at `path`; its top level goes by parameter or, like `parameters`, by position."""
    for depth, key in enumerate(_keys(path)):
        if depth == 0 and isinstance(shapes, list | tuple):
            key = parameters.index(key)
        try:
            shapes = shapes[key]
        except (KeyError, IndexError, TypeError):
            return None
    return shapes


def _keys(path: tuple[Any, ...]) -> list[Any]:
    return [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
