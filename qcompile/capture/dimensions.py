"""The names that a user gave to dynamic dimensions, which torch.export forgets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from passes.graph import val

__all__ = ["dimension_names", "note_dimensions", "noted_dimensions"]

_META = "qcompile_dimensions"  # key of the names in program.graph_module.meta


def note_dimensions(
    program: ExportedProgram, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> None:
    """Keep `dimension_names` with `program`."""
    program.graph_module.meta[_META] = dimension_names(program, model, args, kwargs, shapes)


def noted_dimensions(program: ExportedProgram) -> dict[str, str]:
    """What `note_dimensions` kept; nothing for a program that was loaded or made elsewhere."""
    found = program.graph_module.meta.get(_META)
    return found if isinstance(found, dict) else {}


def dimension_names(
    program: ExportedProgram, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> dict[str, str]:
    """Symbol -> name of the `Dim` that `shapes` has for it: `{"s77": "batch"}`.

    Args:
        program: of `model`, captured with the tensors of `args` and `kwargs`, each of which stands in one place.
        shapes: as in `torch.export.export`. `Dim.DYNAMIC` and sizes derived of others (`2 * batch`) have no name.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = placeholders[len(placeholders) - len(program.graph_signature.user_inputs) :]
    by_tensor = {id(leaf): node for leaf, node in zip(leaves, inputs, strict=True)}
    names: dict[str, str] = {}
    for tensor, axis, name in _named(_by_parameter(model, args, kwargs), shapes):
        node = by_tensor.get(id(tensor))  # None for one inside of a container that torch does not take apart
        size = val(node).shape[axis] if node is not None else None
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            names.setdefault(str(size.node.expr), name)
    return names


def _by_parameter(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `forward` calls its arguments -> the arguments, in their order; those of **kwargs by their own names."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def _named(value: Any, shapes: Any) -> Iterator[tuple[torch.Tensor, int, str]]:
    """(tensor, axis, name) of each named dimension of the tensors in `value`."""
    if isinstance(value, torch.Tensor):
        for axis, dim in shapes.items() if isinstance(shapes, Mapping) else enumerate(_parts(shapes)):
            if isinstance(dim, Dim):
                yield value, int(axis), str(dim.__name__)
    elif isinstance(value, Mapping):
        by_key = shapes if isinstance(shapes, Mapping) else dict(zip(value, _parts(shapes), strict=False))
        for key, part in value.items():
            yield from _named(part, by_key.get(key))
    elif isinstance(value, (list, tuple)):
        for part, shape in zip(value, _parts(shapes), strict=False):
            yield from _named(part, shape)


def _parts(shapes: Any) -> list[Any]:
    return list(shapes) if isinstance(shapes, (list, tuple)) else []
