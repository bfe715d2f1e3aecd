"""The rows `[M, K]` that matrix products want of tensors `[..., K]`, padded where a kernel asks for it, and back."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import Emitter, aten, dtype, shape


def as_rows(emit: Emitter, node: Node) -> Node:
    """`[..., K]` -> `[M, K]`."""
    return node if len(shape(node)) == 2 else emit(aten.reshape.default, node, [-1, shape(node)[-1]])


def like_input(emit: Emitter, result: Node, codes: Node) -> Node:
    """`[M, N]` -> `[..., N]`, with the axes of `codes` `[..., K]`."""
    if len(shape(codes)) == 2:
        return result
    return emit(aten.reshape.default, result, [*emit.sizes(codes)[:-1], shape(result)[-1]])


def pad_rows(emit: Emitter, node: Node, multiple: int) -> Node:
    """`[M, ...]` -> `[M', ...]` of bytes: rows of zeros up to a multiple of `multiple`."""
    rows = shape(node)[0]
    if statically_known_true(rows % multiple == 0):
        return node
    if isinstance(rows, int):
        return pad_by(emit, node, -rows % multiple)
    (rows, *_) = emit.sizes(node)
    return pad_by(emit, node, emit(operator.mod, emit(operator.neg, rows), multiple))


def pad_by(emit: Emitter, node: Node, rows: int | Node) -> Node:
    """Zeros below `[M, K]`. FP8 is padded as bytes, which every version and back end of torch can."""
    to = dtype(node)
    as_bytes = to in (torch.float8_e4m3fn, torch.float8_e5m2)
    if as_bytes:
        node = emit(aten.view.dtype, node, torch.uint8)
    node = emit(aten.constant_pad_nd.default, node, [0, 0, 0, rows])
    return emit(aten.view.dtype, node, to) if as_bytes else node


def first_rows(emit: Emitter, node: Node, like: Node) -> Node:
    """The rows of `[M', N]` that `like` `[M, K]` has."""
    rows, *_ = emit.sizes(like)
    if statically_known_true(shape(node)[0] == shape(like)[0]):
        return node
    return emit(aten.slice.Tensor, node, 0, 0, rows)


def add_bias(emit: Emitter, result: Node, bias: Node | None, to: torch.dtype) -> Node:
    """`result + bias` in the dtype of `result`, rounded to `to` once."""
    if bias is not None:
        if dtype(bias) != dtype(result):
            bias = emit(aten._to_copy.default, bias, dtype=dtype(result))
        result = emit(aten.add.Tensor, result, bias)
    return result if dtype(result) == to else emit(aten._to_copy.default, result, dtype=to)
