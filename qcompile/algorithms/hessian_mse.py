"""`hessian_mse`: scales of weights by the error that they leave in the results of a layer, a block at a time."""

from __future__ import annotations

from functools import cache

import torch
from torch.fx import Node

from passes.formats import Format
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import WEIGHTS, Algorithm, Operand, Seen, View
from qcompile.algorithms.inputs import InputMoments, tell_few_tokens, watch_inputs
from qcompile.algorithms.search import ScaleSearch, Weigh, Weighing
from qcompile.algorithms.settings import HessianMseSettings
from qcompile.algorithms.statistics import Statistic
from qcompile.messages import some

__all__ = ["HessianMse", "block_width", "weighed_by"]

_WIDTH = 16  # of blocks along the reduction axis, where the format has none of a like size
_LEAST = 1e-6  # part of the mean that each input counts at least: one that was always zero in calibration need not stay


class HessianMse(Algorithm[HessianMseSettings]):
    """As `mse`, and errors `e` of a block count `e^T H e`, with `H` the sum of `x x^T` of its inputs over all tokens.

    Ranges of activations are not touched. Weights with no such input (those of convolutions, and all where there are
    ranges and no data) are chosen as `mse` does.
    """

    model = HessianMseSettings
    without_data = "no calibration data for weights: their scales are those of mse, not of hessian_mse"

    @property
    def chooses(self) -> frozenset[str]:
        return frozenset({WEIGHTS})

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def watch(self, view: View) -> dict[Node, Statistic]:
        return watch_inputs(view.weights, block_width)

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        moments = InputMoments(view.weights, seen)
        self._tell(view, moments)
        return ScaleSearch(self.settings, weighed_by(moments)).weights(view)

    def _tell(self, view: View, moments: InputMoments) -> None:
        """Notices of weights that are chosen without their inputs, and of those with few."""
        left = [weight.name for weight in view.weights if not moments.key(weight)]
        if left:
            view.notices.append(f"no input of a linear layer was seen for {some(left)}: their scales are those of mse")
        tell_few_tokens(view, moments, block_width)


def block_width(weight: Operand) -> int:
    """How wide the blocks of the second moment are that `weight` is searched with."""
    *_, width = weight.format.sizes or (_WIDTH,)
    return width if width <= 4 * _WIDTH else _WIDTH


def weighed_by(moments: InputMoments) -> Weigh:
    """Errors weighed by what was kept of the inputs."""

    @cache
    def blocks(weight: Operand) -> torch.Tensor | None:
        return moments.blocks(weight, block_width(weight))

    @cache
    def weigh(weight: Operand, expert: int) -> Weighing:
        found = blocks(weight)
        if found is None:
            return Weighing()
        own = found[expert if found.shape[0] > 1 else 0]
        return Weighted(own) if bool(own.any()) else Weighing()

    return weigh


class Weighted(Weighing):
    """Errors `e` in each block along the reduction axis count `e^T H e`."""

    def __init__(self, moment: torch.Tensor) -> None:
        """`[n, w, w]`, the blocks of `H`; an input that was always zero counts a little."""
        self.width = moment.shape[-1]
        size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        unit = torch.eye(self.width, dtype=moment.dtype)
        own = torch.where(size > 0, size, 1.0)[:, None, None]
        self.each = (torch.where(size[:, None, None] > 0, moment / own, unit) + _LEAST * unit).float()
        self.all = (moment / size.mean() + _LEAST * unit).float()

    def rows(self, errors: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(errors, (0, len(self.all) * self.width - errors.shape[-1]))
        return self._count(whole.view(len(errors), -1, self.width), self.all).sum(0, dtype=torch.float64)[:, None]

    def blocks(self, errors: torch.Tensor, fmt: Format) -> torch.Tensor:
        rows, count, elements = errors.shape
        width = fmt.sizes[-1]
        parts, high = width // self.width, elements // width
        moment = torch.nn.functional.pad(self.each, (0, 0, 0, 0, 0, count * parts - len(self.each)))
        split = errors.view(rows, count, high, parts, self.width).transpose(1, 2).reshape(rows * high, -1, self.width)
        return self._count(split, moment).view(count, parts, rows, high).sum((1, 3)).T

    @staticmethod
    def _count(errors: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """`[M, n, w]` with `[n, w, w]` -> `[n, M]`."""
        split = errors.transpose(0, 1).contiguous()
        return torch.bmm(split, moment.to(split.device)).mul_(split).sum(-1)
