"""The scales that GPTQ rounds columns with: known before, or searched when the turn of a block comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.codes import block_scale_numbers
from passes.formats import Format
from qcompile.algorithms.base import Operand
from qcompile.algorithms.feedback import Feedback
from qcompile.algorithms.hessian_mse import Weighted
from qcompile.algorithms.search import ScaleSearch, Weighing

__all__ = ["KnownScales", "SearchedScales"]


class KnownScales:
    """Of several weights below each other."""

    def __init__(self, scales: Sequence[torch.Tensor], rows: Sequence[int], fmt: Format) -> None:
        """`scales`: of each weight, `[N or 1, blocks]`; `rows`: how many N are."""
        self.width = fmt.sizes[-1] if fmt.sizes else 0
        self.whole = torch.cat([own.expand(count, -1) for own, count in zip(scales, rows, strict=True)]).T.contiguous()

    def __call__(self, column: int, position: int, ahead: torch.Tensor) -> torch.Tensor:
        return self.whole[column // self.width if self.width else 0]


class SearchedScales:
    """Of each block when its first column is rounded, for what the weights of the block have become by then.

    An error in the block is weighed by what of it no column behind the block can make up for: `U D U^T` of the block.

    Attributes:
        found: block -> of each weight the scales as they are stored, `[N, 1]`.
    """

    def __init__(
        self, search: ScaleSearch, weighed: bool, feedback: Feedback, scales: Sequence[torch.Tensor | None],
        rows: Sequence[int], weight: Operand,
    ) -> None:  # fmt: skip
        """`scales`: the global one of each weight, in a format that has it; `rows`: how many each weight has; `weight`:
        the first of them, for what they have in common."""
        self.search, self.weighed, self.feedback = search, weighed, feedback
        self.scales, self.rows, self.weight, self.fmt = scales, list(rows), weight, weight.format
        self.found: dict[int, list[torch.Tensor]] = {}
        self._numbers: dict[int, torch.Tensor] = {}

    def __call__(self, column: int, position: int, ahead: torch.Tensor) -> torch.Tensor:
        (width,) = self.fmt.sizes
        block = column // width
        if block not in self.found:
            count = min(width, len(self.feedback.order) - block * width)
            weighing = self._weighing(position, count, width) if self.weighed else Weighing()
            parts = torch.split(ahead[:count].T.float().contiguous(), self.rows)
            self.found[block] = [
                self.search.block_scales(own, scale, self.weight, weighing)
                for own, scale in zip(parts, self.scales, strict=True)
            ]
            numbers = zip(self.found[block], self.scales, strict=True)
            self._numbers[block] = torch.cat([block_scale_numbers(own, scale, self.fmt) for own, scale in numbers])[
                :, 0
            ]
        return self._numbers[block]

    def stored(self, index: int) -> torch.Tensor:
        """The scales of one of the weights, `[N, blocks]`."""
        return torch.cat([self.found[block][index] for block in range(len(self.found))], -1)

    def _weighing(self, position: int, count: int, width: int) -> Weighted:
        own = slice(position, position + count)
        factors = self.feedback.factors[own, own].double()
        moment = (factors * self.feedback.weights[own].double()) @ factors.T
        return Weighted(torch.nn.functional.pad(moment, (0, width - count, 0, width - count))[None].cpu())
