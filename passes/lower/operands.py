"""Reading a linear layer whose operands are dequantized, and the rows and scales that matrix products want of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.constants import add_constant, constant, delete_constant, evaluate_constant, is_constant_expression
from passes.formats import Format, get_format
from passes.graph import Emitter, argument, aten, dtype, is_call, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.quantize.sites import linear_name


@dataclass(frozen=True)
class QuantizedLinear:
    """`linear(dequantize(codes, scale), dequantize(weight_codes, weight_scale), bias)`.

    Attributes:
        node: the call of `aten.linear` or `batched_linear`.
        input, weight: its two dequantized operands.
        bias: None if there is none.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None

    @classmethod
    def read(cls, node: Node) -> QuantizedLinear | None:
        """`node` if both operands are dequantized, the weight from constants; None if it is anything else."""
        if not is_call(node, aten.linear.default, BATCHED_LINEAR):
            return None
        x, weight = node.args[:2]
        if not isinstance(x, Node) or not is_call(x, DEQUANTIZE) or not has_constant_codes(weight):
            return None
        assert isinstance(weight, Node)
        bias = argument(node, "bias")
        return cls(node, x, weight, bias if isinstance(bias, Node) else None)

    @property
    def codes(self) -> Node:
        return _first(self.input, 0)

    @property
    def scale(self) -> Node:
        """Of the input; the dequantize of the block scales in a format of two levels."""
        return _first(self.input, 1)

    @property
    def weight_codes(self) -> Node:
        return _first(self.weight, 0)

    @property
    def weight_scale(self) -> Node:
        return _first(self.weight, 1)

    @property
    def format(self) -> Format:
        """Of the input."""
        return get_format(str(self.input.kwargs["format"]))

    @property
    def weight_format(self) -> Format:
        return get_format(str(self.weight.kwargs["format"]))

    @property
    def name(self) -> str:
        """Path of the layer."""
        return linear_name(self.node)

    @property
    def dtype(self) -> torch.dtype:
        return dtype(self.node)

    @property
    def sizes(self) -> tuple[int, int]:
        """N and K of the weight `[N, K]`."""
        rows, columns = shape(self.weight)[-2:]
        return int(rows), int(columns)


def has_constant_codes(weight: object) -> bool:
    """Whether `weight` is dequantized from constants."""
    if not isinstance(weight, Node) or not is_call(weight, DEQUANTIZE):
        return False
    codes, scale = weight.args
    if is_call(scale, DEQUANTIZE):
        assert isinstance(scale, Node)
        return is_constant_expression(codes) and all(map(is_constant_expression, scale.args))
    return is_constant_expression(codes) and is_constant_expression(scale)


def misaligned(linear: QuantizedLinear, k: int, n: int) -> str | None:
    """Why a product wants other sizes than those of `linear`, where K is to be a multiple of `k` and N of `n`."""
    rows, columns = linear.sizes
    for letter, size, multiple in (("K", columns, k), ("N", rows, n)):
        if size % multiple:
            return f"{letter} = {size} is no multiple of {multiple}"
    return None


def is_one_scale(scale: Node) -> bool:
    """Whether `scale` is one number for the whole tensor."""
    return all(isinstance(size, int) and size == 1 for size in shape(scale))


def runs_along_k(scale: Node) -> bool:
    """Whether `scale` differs along the last axis of what it scales."""
    return len(shape(scale)) > 0 and shape(scale)[-1] != 1


def is_row_scale(scale: Node, values: Node) -> bool:
    """Whether `scale` is `[..., 1]` for `values` `[..., K]`."""
    sizes, lead = shape(scale), shape(values)[:-1]
    same = len(sizes) == len(lead) + 1 and sizes[-1] == 1
    return same and all(statically_known_true(a == b) for a, b in zip(sizes, lead, strict=False))


def constant_like(gm: GraphModule, node: Node, name: Node, convert: Callable[[torch.Tensor], torch.Tensor]) -> Node:
    """A new constant made of the constant expression `name` by `convert`, placed before `node` and called alike."""
    root = name if name.op == "get_attr" else name.all_input_nodes[0]
    while root.op != "get_attr":
        root = root.all_input_nodes[0]
    return add_constant(gm, str(root.target), convert(evaluate_constant(gm, name)), node)


def float32_scale(gm: GraphModule, emit: Emitter, scale: Node) -> Node:
    """`scale` in float32: a constant stays one."""
    if dtype(scale) == torch.float32:
        return scale
    if constant(gm, scale) is not None:
        return constant_like(gm, emit.before, scale, torch.Tensor.float)
    return emit(aten._to_copy.default, scale, dtype=torch.float32)


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


def constants_read(gm: GraphModule) -> set[str]:
    """Names of the constants that the graph reads."""
    return {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}


def forget_unread(gm: GraphModule, before: set[str]) -> None:
    """Unregister those of the constants `before` that nothing reads any more."""
    gm.graph.eliminate_dead_code()
    for name in sorted(before - constants_read(gm)):
        delete_constant(gm, name)


def _first(node: Node, index: int) -> Node:
    operand = node.args[index]
    assert isinstance(operand, Node), f"{node} has no tensor as argument {index}"
    return operand
