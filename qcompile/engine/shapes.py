"""Shapes of the attentions in a graph, at the smallest shapes of an optimization profile."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.engine.patterns import Attention


def lengths(attention: Attention, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """Number of queries and of keys of an attention, None when shape inference could not tell."""
    if attention.scores is not None:
        shape = shapes.get(attention.scores)
        return (shape[-2], shape[-1]) if shape and len(shape) >= 2 else (None, None)
    return _length(shapes.get(attention.query)), _length(shapes.get(attention.key))


def _length(shape: tuple[int, ...] | None) -> int | None:
    return shape[-2] if shape and len(shape) >= 2 else None


def head_dim(attention: Attention, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Head dimension of an attention, None when shape inference could not tell or the heads are not split (rank 3)."""
    shape = shapes.get(attention.query)
    return shape[-1] if shape and (len(shape) == 4 or attention.scores is not None) else None
