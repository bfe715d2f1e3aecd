"""A quantized layer read off a graph: its codes, its scales, their formats, and those of its input.

    dequantize(codes, scale)                                    one level
    dequantize(codes, dequantize(block_scales, global_scale))   two, as NVFP4 has them

What these are made of, constants or something from run time, is asked of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from passes.constants import is_constant_expression
from passes.formats import Format, get_format
from passes.graph import argument, dtype, is_call, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.operators import operator_of
from passes.pairs import measured_by
from passes.quantize.sites import linear_name

__all__ = ["Operand", "QuantizedLayer", "source_of"]


@dataclass(frozen=True)
class Operand:
    """What a dequantize gives its readers.

    Attributes:
        node: the dequantize.
    """

    node: Node

    @classmethod
    def read(cls, operand: object) -> Operand | None:
        """`operand` if it is a dequantize; None if it is anything else."""
        return cls(operand) if isinstance(operand, Node) and is_call(operand, DEQUANTIZE) else None

    @property
    def format(self) -> Format:
        return get_format(str(self.node.kwargs["format"]))

    @property
    def codes(self) -> Node:
        return _argument(self.node, 0)

    @property
    def scale(self) -> Node:
        """What multiplies the codes: the dequantize of the block scales in a format of two levels."""
        return _argument(self.node, 1)

    @property
    def block_scales(self) -> Node | None:
        """The codes of the block scales in a format of two levels; None for others."""
        return _argument(self.scale, 0) if is_call(self.scale, DEQUANTIZE) else None

    @property
    def global_scale(self) -> Node | None:
        """The scale of the block scales in a format of two levels; None for others."""
        return _argument(self.scale, 1) if is_call(self.scale, DEQUANTIZE) else None

    @property
    def parts(self) -> list[Node]:
        """All that the values are computed from: codes and scales of each level."""
        scales = [self.scale] if self.block_scales is None else [_argument(self.scale, 0), _argument(self.scale, 1)]
        return [self.codes, *scales]

    @property
    def is_constant(self) -> bool:
        """Whether codes and scales are constants."""
        return all(map(is_constant_expression, self.parts))

    @property
    def measured(self) -> Node | None:
        """The dynamic quantize that made the codes, if one did."""
        return measured_by(self.node)

    @property
    def quantizer(self) -> Node | None:
        """The quantize or dynamic quantize that made the codes; None for codes that are stored."""
        made = self.measured or self.codes
        return made if is_call(made, QUANTIZE, DYNAMIC_QUANTIZE) else None

    @property
    def source(self) -> Node | None:
        """What this was before it was quantized; None for codes that are stored."""
        return None if self.quantizer is None else _argument(self.quantizer, 0)


def source_of(operand: object) -> Node | None:
    """What `operand`, a dequantize, was before it was quantized; None if it is anything else."""
    quantized = Operand.read(operand)
    return None if quantized is None else quantized.source


@dataclass(frozen=True)
class QuantizedLayer:
    """`linear(x, dequantize(codes, scale), bias)`, the same of all experts of a mixture, or of another operator.

    Attributes:
        node: the call of one that `passes.operators` has a weight for.
        weight: its codes can still be the quantize of a constant, before `FoldWeights`.
        input: None where it is not quantized.
        bias: None if there is none.
    """

    node: Node
    weight: Operand
    input: Operand | None
    bias: Node | None

    @classmethod
    def read(cls, node: Node) -> QuantizedLayer | None:
        """`node` if it is a layer with a quantized weight; None if it is anything else."""
        row = operator_of(node)
        weight = None if row is None else Operand.read(row.weight(node))
        if row is None or weight is None:
            return None
        index, bias = row.operands["input"], argument(node, "bias")
        x = None if index is None else Operand.read(node.args[index])
        return cls(node, weight, x, bias if isinstance(bias, Node) else None)

    @classmethod
    def of_codes(cls, node: Node) -> QuantizedLayer | None:
        """`node` if both of its operands are quantized, and the weight is stored as codes; None otherwise."""
        layer = cls.read(node)
        return layer if layer is not None and layer.input is not None and layer.weight.is_constant else None

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
        rows, columns = shape(self.weight.node)[-2:]
        return int(rows), int(columns)

    @property
    def x(self) -> Operand:
        """`input` of a layer that has it quantized, as those of `of_codes` have."""
        assert self.input is not None, f"the input of {self.node} is not quantized"
        return self.input


def _argument(node: Node, index: int) -> Node:
    found = node.args[index]
    assert isinstance(found, Node), f"{node} has no tensor as argument {index}"
    return found
