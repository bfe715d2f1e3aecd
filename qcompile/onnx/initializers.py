"""Constants that are added to a file."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import onnx_ir as ir

from qcompile.onnx.view import Array

__all__ = ["copied", "initializer", "taken_names", "unique_name"]


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


def taken_names(model: ir.Model) -> set[str | None]:
    """The names of the values of all graphs of `model`, which have one scope."""
    graphs = (model.graph, *model.graph.subgraphs())
    taken = {value.name for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    return taken | {value.name for node in model.graph.all_nodes() for value in node.outputs}


def unique_name(taken: set[str | None], name: str) -> str:
    """`name`, with a number if it is `taken`; it is from now on."""
    numbered = (f"{name}_{i}" for i in itertools.count(1))
    free = next(free for free in itertools.chain([name], numbered) if free not in taken)
    taken.add(free)
    return free


def copied(model: ir.Model, value: ir.Value, taken: set[str | None]) -> ir.Value:
    """Another initializer with what the initializer `value` holds, named beside those of `taken`."""
    tensor = copy.copy(value.const_value)
    assert tensor is not None
    tensor.name = unique_name(taken, str(value.name))
    own = ir.Value(name=tensor.name, shape=value.shape, type=value.type, const_value=tensor)
    model.graph.register_initializer(own)
    return own
