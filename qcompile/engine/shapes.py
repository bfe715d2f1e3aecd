"""Shapes of the attentions in a graph, at the smallest shapes of an optimization profile."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.engine.patterns import Attention


def key_length(attention: Attention, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Number of keys of an attention, None when shape inference could not tell."""
    if attention.scores is not None:
        shape = shapes.get(attention.scores)
        return shape[-1] if shape else None
    shape = shapes.get(attention.key)
    return shape[-2] if shape and len(shape) >= 2 else None


def head_dim(attention: Attention, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Head dimension of an attention, None when shape inference could not tell or the heads are not split (rank 3)."""
    shape = shapes.get(attention.query)
    return shape[-1] if shape and (len(shape) == 4 or attention.scores is not None) else None
