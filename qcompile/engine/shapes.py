"""Static shapes of the attentions in an ONNX file, at the smallest shapes of an optimization profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from qcompile.engine.patterns import Attention


def static_shapes(model: onnx.ModelProto, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Infer the static shape of every tensor when each graph input has the shape in `minima`.

    Args:
        model: without the values of its weights (a copy is made); it is not changed.
        minima: input name -> shape. Inputs that are left out keep the shape they declare.

    Returns:
        tensor name -> shape, for the tensors whose shape is fully known.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value in copy.graph.input:
        if value.name in minima:
            for dim, size in zip(value.type.tensor_type.shape.dim, minima[value.name], strict=False):
                dim.dim_value = size
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    shapes = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    return shapes


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
