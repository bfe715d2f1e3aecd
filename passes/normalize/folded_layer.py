"""The numbers of a layer that norms beside it are folded into: float64, some rows of its weight at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from passes.constants import evaluate_constant, is_constant_expression
from passes.graph import argument, aten, is_call

__all__ = ["PIECE", "Affine", "FoldedLayer"]

# Elements, 256 KB. A whole weight in float64 is four times what float16 stores, and where numbers of that size come and
# go among the results that stay, they leave holes that the allocator does not give back: 30 to 120 MB for a ResNet-50.
PIECE = 1 << 15


@dataclass(frozen=True)
class Affine:
    """`x * factor + shift` along the channels, each float64 `[C]`."""

    factor: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class FoldedLayer:
    """A convolution or linear layer, its norms beside it: float64 numbers for the channels, as the weight is large.

    Attributes:
        stored: the weight as it was, `[out, in / groups, ...]`, transposed `[in, out / groups, ...]`.
        bias: `[out]`. outer, inner: factors that the weight of each output and input has by now, `[out]` and `[in]`.
    """

    stored: torch.Tensor
    bias: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, gm: GraphModule, node: Node) -> FoldedLayer | None:
        """None where the weight or bias is no constant."""
        weight, bias = argument(node, "weight"), argument(node, "bias")
        if not is_constant_expression(weight) or not (bias is None or is_constant_expression(bias)):
            return None
        values = evaluate_constant(gm, weight)
        is_convolution = is_call(node, aten.convolution.default)
        groups, transposed = (argument(node, "groups"), argument(node, "transposed")) if is_convolution else (1, False)
        first, second = values.shape[:2]
        outputs, inputs = (second * groups, first) if transposed else (first, second * groups)
        outer = torch.ones(outputs, dtype=torch.float64, device=values.device)
        known = torch.zeros_like(outer) if bias is None else evaluate_constant(gm, bias).double()
        return cls(values, known, outer, outer.new_ones(inputs), groups, transposed)

    def before(self, norm: Affine) -> FoldedLayer:
        """The layer that gives what `norm` makes of this one's results."""
        return replace(self, bias=self.bias * norm.factor + norm.shift, outer=self.outer * norm.factor)

    def behind(self, norm: Affine) -> FoldedLayer:
        """The layer that makes of the input of `norm` what this one makes of its results; not for transposed ones."""
        bias, shift = self.bias.clone(), norm.shift.reshape(self.groups, -1)
        for rows, weight in self._pieces():
            bias[rows] += (weight.reshape(*weight.shape[:2], -1).sum(-1) * shift[self._group_of(rows)]).sum(-1)
        return replace(self, bias=bias, inner=self.inner * norm.factor)

    def leaves(self, kind: torch.dtype) -> bool:
        """Whether a number of it is beyond `kind`."""
        # rounding keeps the order, so the two ends tell; they carry a NaN on
        ends = [end for tensor in (self.bias, *(w for _, w in self._pieces())) for end in tensor.aminmax()]
        return not bool(torch.stack(ends).to(kind).isfinite().all())

    def weight(self, kind: torch.dtype) -> torch.Tensor:
        """The weight as it is by now, rounded once."""
        rounded = torch.empty_like(self.stored, dtype=kind)
        for rows, weight in self._pieces():
            rounded[rows] = weight.to(kind)
        return rounded

    def _pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows (of the first axis) of the weight as it is by now, in float64."""
        by_row, others = (self.inner, self.outer) if self.transposed else (self.outer, self.inner)
        by_group, rest = others.reshape(self.groups, -1), [1] * (self.stored.ndim - 2)
        step = max(1, PIECE * self.stored.shape[0] // max(1, self.stored.numel()))
        for start in range(0, self.stored.shape[0], step):
            rows = slice(start, start + step)
            factors = by_row[rows, None] * by_group[self._group_of(rows)]
            yield rows, self.stored[rows].double() * factors.reshape(*factors.shape, *rest)

    def _group_of(self, rows: slice) -> torch.Tensor:
        """The group of each row."""
        count = self.stored.shape[0]
        return torch.arange(count, device=self.stored.device)[rows] // (count // self.groups)
