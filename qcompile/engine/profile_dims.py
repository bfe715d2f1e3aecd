"""Optimization profiles by the names of dimensions: `{"past": (0, 128, 512)}` for every input that has a `past`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Sizes = tuple[int, int, int]
Dims = Mapping[str, Sequence[int | str]]

NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def with_shapes(profile: Mapping[str, Any], inputs: Dims) -> dict[str, Any]:
    """`profile` with the shapes of the inputs in the place of the sizes of dimensions, `(min, opt, max)`.

    Sizes under the name of a dimension count for it wherever it stands, also in one derived of it (`past + 1`). An
    input whose shapes are given keeps them, and one of which a dimension is missing gets none.
    """
    known = {name for dims in inputs.values() for dim in dims for name in NAME.findall(str(dim))}
    sizes = {n: s for n, s in profile.items() if n in known and _is_sizes(s)}
    result = {n: s for n, s in profile.items() if n not in sizes}
    for name, dims in inputs.items():
        if name not in result and any(isinstance(dim, str) for dim in dims):
            shapes = [tuple(_value(dim, {n: s[k] for n, s in sizes.items()}) for dim in dims) for k in range(3)]
            if not any(size is None for shape in shapes for size in shape):
                result[name] = tuple(shapes)
        elif _is_sizes(result.get(name)) and len(dims) == 1:
            result[name] = tuple((size,) for size in result[name])
    return result


def likely(inputs: Dims) -> dict[str, Any]:
    """A profile to start from: sizes for the dimensions that have names, shapes for inputs where one has none."""
    sizes: dict[str, Sizes] = {}
    for dims in inputs.values():
        for axis, dim in enumerate(dims):
            if isinstance(dim, str) and NAME.fullmatch(dim):
                sizes.setdefault(dim, _guess(axis))
    shapes = {}
    for name, dims in inputs.items():
        if any(_value(dim, dict.fromkeys(sizes, 1)) is None for dim in dims):
            axes = [3 * (d,) if isinstance(d, int) else sizes.get(d, _guess(axis)) for axis, d in enumerate(dims)]
            shapes[name] = tuple(zip(*axes, strict=True))
    return {**sizes, **shapes}


def _guess(axis: int) -> Sizes:
    return (1, 8, 32) if axis == 0 else (32, 128, 512)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(size, int) for size in value)


def _value(dim: int | str, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension, which may be derived of others; None if it cannot be told."""
    if isinstance(dim, int):
        return dim
    try:
        return _evaluated(ast.parse(dim.strip(), mode="eval").body, sizes)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError):  # a file may call it anything
        return None


def _evaluated(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluated(node.left, sizes), _evaluated(node.right, sizes))
    raise ValueError(node)
