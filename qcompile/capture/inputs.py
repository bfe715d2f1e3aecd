"""Example inputs that are nothing but inputs, and batches that lie in memory as those do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError
from qcompile.messages import first_line


def own_copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with a copy of its own in every place where a tensor stands.

    torch.export tells tensors by identity: one that is given twice, or is a weight of the model, would be one input for
    good, and a program of `m(x, x)` would compute `m(y, y)` of `m(x, y)`. A copy of a view is none, too, so that its
    strides and its base are not checked in every later call; where elements neither overlap nor leave gaps, the copy
    keeps the order of the axes in memory.
    """
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))  # type: ignore[no-any-return]


def shapes_by_input(shapes: Any, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`dynamic_shapes` for copies of these inputs: a `ShapesCollection` knows them by identity."""
    if not isinstance(shapes, torch.export.ShapesCollection):
        return shapes
    try:
        return shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise CaptureError(f"dynamic_shapes: {first_line(error)}") from error


def laid_out(values: Sequence[Any], examples: Sequence[Any]) -> list[Any]:
    """Flat inputs with their axes in the order in memory that those of the examples have.

    A graph has `view` where the examples allowed it, and that fails for a transposed tensor of the same shape.
    """
    return [_laid_out(value, example) for value, example in zip(values, examples, strict=True)]


def _laid_out(value: Any, example: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not isinstance(example, torch.Tensor) or value.ndim != example.ndim:
        return value
    if value.layout is not torch.strided or example.layout is not torch.strided:
        return value
    order = sorted(range(example.ndim), key=example.stride, reverse=True)
    back = sorted(range(example.ndim), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)
