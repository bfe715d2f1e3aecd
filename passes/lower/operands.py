"""Reading a linear layer whose operands are dequantized, and replacing the constants that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, delete_constant, evaluate_constant, is_constant_expression, root_constants
from passes.formats import Format, get_format
from passes.graph import argument, aten, dtype, is_call, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.pairs import measured_by
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


def source_of(operand: object) -> Node | None:
    """What `operand`, a dequantize, was before it was quantized; None if it is anything else."""
    if not isinstance(operand, Node) or not is_call(operand, DEQUANTIZE):
        return None
    codes = measured_by(operand) or operand.args[0]
    if not is_call(codes, QUANTIZE, DYNAMIC_QUANTIZE):
        return None
    assert isinstance(codes, Node)
    source = codes.args[0]
    return source if isinstance(source, Node) else None


def misaligned(linear: QuantizedLinear, k: int, n: int) -> str | None:
    """Why a product wants other sizes than those of `linear`, where K is to be a multiple of `k` and N of `n`."""
    rows, columns = linear.sizes
    for letter, size, multiple in (("K", columns, k), ("N", rows, n)):
        if size % multiple:
            return f"{letter} = {size} is no multiple of {multiple}"
    return None


def constant_like(
    gm: GraphModule, before: Node, expression: Node, convert: Callable[[torch.Tensor], torch.Tensor]
) -> Node:
    """A new constant made of the constant `expression` by `convert`, placed before `before` and called alike."""
    root = root_constants(expression)[0]
    return add_constant(gm, str(root.target), convert(evaluate_constant(gm, expression)), before)


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
