"""Constants that are added to a file."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from qcompile.onnx.view import Array

__all__ = ["initializer", "unique_name"]


def initializer(model: ir.Model, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """The initializer `name` of the graph; it is added with the numbers of `array` if there is none.

    `dtype` is that of the file where numpy's does not tell.
    """
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.asarray(array), dtype=dtype, name=name)
        shape = ir.Shape(tensor.shape.numpy())
        model.graph.register_initializer(
            ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return model.graph.initializers[name]


def unique_name(model: ir.Model, name: str) -> str:
    """`name`, with a number where a value of any graph of `model` has that: all have one scope."""
    graphs = (model.graph, *model.graph.subgraphs())
    taken = {value.name for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    numbered = (f"{name}_{i}" for i in itertools.count(1))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)
