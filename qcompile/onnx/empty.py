"""What a file needs so that a batch or a sequence of size 0 runs: two habits of torch.onnx go wrong there.

    before:  x [B, S, K], [-1] -> ReduceMax -> [B, S, 1]
    after:   x [B, S, K], [2]  -> ReduceMax -> [B, S, 1]

Where an axis of `x` is empty, ONNX Runtime 1.31 returns the shape of `x` for a negative axis, of every Reduce operator,
ArgMax and ArgMin (`[0, S, K]` for `[0, S, 1]`), and what reads it fails or broadcasts wrong.

    before:  x, Concat(..., S, ...) -> Reshape
    after:   x, Concat(..., S, ...) -> Reshape (allowzero)

Without `allowzero` a 0 in a shape is "as it was", of the axis of `x` at that place, also if it was computed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.initializers import initializer
from qcompile.onnx.moves import is_operator

_REDUCE = tuple(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
)
_ARG = ("ArgMax", "ArgMin")


def allow_empty(model: ir.Model) -> None:
    """Write constant axes of reductions from the front, and let computed shapes have zeros, in place.

    In subgraphs, too. A reduction whose input has an unknown rank stays, and a Reshape to a shape that has a -1, beside
    which `allowzero` takes no zero, or a 0 that is a constant.
    """
    for node in model.graph.all_nodes():
        if is_operator(node, "Reshape"):
            if _is_computed(node.inputs[1]):
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
        elif is_operator(node, *_REDUCE, *_ARG) and node.inputs[0] is not None and node.inputs[0].shape is not None:
            count = _count_attribute if node.op_type in _ARG else _count_input
            count(model, node, len(node.inputs[0].shape))


def _is_computed(shape: ir.Value | None) -> bool:
    """Whether `shape` is computed, and its constant parts are sizes."""
    if shape is None or ir.convenience.get_const_tensor(shape) is not None:
        return False
    producer = shape.producer()
    parts = list(producer.inputs) if is_operator(producer, "Concat") and producer is not None else [shape]
    constants = [ir.convenience.get_const_tensor(part) for part in parts if part is not None]
    return all(bool((part.numpy() > 0).all()) for part in constants if part is not None)


def _count_attribute(model: ir.Model, node: ir.Node, rank: int) -> None:
    axis = node.attributes.get_int("axis", 0)
    if axis < 0:
        node.attributes["axis"] = ir.AttrInt64("axis", axis + rank)


def _count_input(model: ir.Model, node: ir.Node, rank: int) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    known = ir.convenience.get_const_tensor(axes) if axes is not None else None
    if known is not None and bool((known.numpy() < 0).any()):
        counted = [int(axis) % rank for axis in known.numpy()]
        name = "_".join(("axes", *map(str, counted)))  # one for all who want them
        node.replace_input_with(1, initializer(model, name, np.array(counted, np.int64)))
