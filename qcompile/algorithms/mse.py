"""`mse`: the scale whose codes come nearest to the numbers, by the mean of squared errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.fx import Node

from passes.codes import block_scale_numbers, rows_together
from passes.formats import Format
from passes.ir import block_numbers, block_scale_values
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import Algorithm, Operand, Seen, View, quantizer, ranges
from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.algorithms.settings import Settings
from qcompile.algorithms.statistics import Histogram, Largest, Statistic

_PIECE = 1 << 16  # elements that are tried at once: larger intermediates leave the caches


class MseSettings(Settings):
    """`mse`: scales by the squared error of what they round."""

    algorithm: Literal["mse"]
    """`mse`: the scale with the least squared error, of each weight by its numbers, of activations with a constant
    scale by a histogram of the calibration data. Weights need no data."""
    smallest: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=False)] = 0.5
    """The least scale of a weight that is tried, as a part of that of `max`: what is larger then saturates."""
    largest: Annotated[float, Field(ge=1, le=4, allow_inf_nan=False, strict=False)] = 1.75
    """The largest scale of a weight that is tried: a block whose largest number becomes 4 and not 6 may lose less."""
    candidates: Annotated[int, Field(ge=2, le=1000)] = 32
    """How many scales of a weight are tried, beside that of `max`, and four times as many ranges of an activation. The
    scales of nvfp4's blocks are e4m3 numbers, of which all in the range are."""
    smallest_range: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=False)] = 0.05
    """The least range of an activation that is tried, as a part of the largest magnitude that was seen; 1 leaves them
    to `max`."""


class Mse(Algorithm[MseSettings]):
    """Weights are searched row by row, block by block, or as a whole; those that share a scale together.

    The scale of `max` is among the candidates, and wins where no other is better, so the squared error is never larger
    than with `max`. Activations in NVFP4 stay with `max`: the scales of their blocks follow the data anyhow.
    """

    model = MseSettings

    def watch(self, view: View) -> dict[Node, Statistic]:
        return {operand.node: Histogram() for operand in self._clipped(view)}

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        found = {weight: self._weight(view, weight) for weight in view.weights if not self._is_shared(view, weight)}
        for group in view.groups:
            members = [weight for weight in group if weight in view.operands and self._is_shared(view, weight)]
            if members:
                found |= dict.fromkeys(members, self._tensor(members, view.amax(members[0])))
        part = view.of(self._clipped(view), view.quantizers)
        return found | {
            operand: quantizer(operand, amax, self.settings.power_of_two)
            for operand, amax in ranges(part, seen, self._range).items()
        }

    def _clipped(self, view: View) -> list[Operand]:
        return [o for o in view.activations if o.format.scale is None and self.settings.smallest_range < 1]

    @staticmethod
    def _is_shared(view: View, weight: Operand) -> bool:
        """Whether one scale for several whole weights is searched; a global scale above blocks stays that of `max`."""
        return not weight.format.sizes and len(view.group(weight)) > 1

    def _weight(self, view: View, weight: Operand) -> Quantizer:
        if weight.format.sizes:
            return self._blocks(view, weight)
        return self._tensor([weight], view.amax(weight))

    def _tensor(self, weights: Sequence[Operand], amax: torch.Tensor) -> Quantizer:
        """One scale for all `weights`, or one for each row of one."""
        first = weights[0]
        base = scale_of(amax, first.config, self.settings.power_of_two)
        scales = torch.stack([base * factor for factor in self._factors()]).clamp_min(torch.finfo(torch.float32).tiny)
        stored = torch.stack([first.stored(scale).float() for scale in scales])
        errors = torch.zeros(scales.shape, dtype=torch.float64, device=scales.device)
        for weight in weights:
            for rows, values in weight.rows():
                if len(first.reduced_axes) > 1:  # a convolution, whose first axis has the channels
                    values = values.flatten(1)
                if first.per_channel:
                    found = _row_errors(values, stored[:, rows], base[rows], first.format)
                    errors[:, rows] += found.reshape(errors[:, rows].shape)
                else:
                    errors += _row_errors(values, stored, base, first.format).flatten(1).sum(1)
        errors = errors.where(torch.isfinite(stored) & (stored > 0), torch.inf)
        return Quantizer(first.format, scales.gather(0, _least(errors).unsqueeze(0)).squeeze(0), amax=amax)

    def _blocks(self, view: View, weight: Operand) -> Quantizer:
        """The scales of blocks, under the global one of `max` where the format has it."""
        fmt, amax = weight.format, view.amax(weight)  # which finds a NaN
        scale = None
        if has_constant(weight.config):
            scale = scale_of(amax, weight.config, self.settings.power_of_two)
        parts = [
            self._block_scales(piece.float(), scale, weight)
            for _, values in weight.rows(rows_together(fmt, len(weight.shape)))
            for piece in _pieces(values, fmt)
        ]
        shape = (*weight.shape[: -len(fmt.sizes)], *fmt.blocks(weight.shape))
        return Quantizer(fmt, scale, torch.cat(parts).reshape(shape))

    def _block_scales(self, values: torch.Tensor, scale: torch.Tensor | None, weight: Operand) -> torch.Tensor:
        """`[M, K]` -> the best scale of each block, as it is stored."""
        fmt = weight.format
        candidates = self._codes_near(values, scale, fmt) if scale is not None else self._numbers_near(values, weight)
        blocks, best, least = _in_blocks(values, fmt), None, torch.empty(())
        unit = torch.empty(())
        for candidate in candidates:
            own = block_scale_numbers(candidate, scale, fmt).unsqueeze(-1)
            if best is None:
                best, unit, in_units = candidate, own, blocks / own
                least = _error(blocks, in_units, own, own, fmt).sum(-1)
                continue
            error = _error(blocks, in_units, own, unit, fmt).sum(-1)
            better = error < least
            best, least = _where(better, candidate, best), torch.where(better, error, least)
        assert best is not None
        return best

    def _codes_near(self, values: torch.Tensor, scale: torch.Tensor, fmt: Format) -> Iterator[torch.Tensor]:
        """What the blocks measure, and the numbers of the scales' format around it, whose codes are in their order."""
        assert fmt.scale is not None
        measured = fmt.scale.encode(block_scale_values(values, scale, fmt))
        yield measured
        number, size = measured.view(torch.uint8).int(), measured.float()
        most = int(torch.tensor(fmt.scale.max).to(fmt.scale.storage).view(torch.uint8))
        low, high = (math.ceil(8 * math.log2(factor)) for factor in (1 / self.settings.smallest, self.settings.largest))
        for step in range(-low, high + 1):  # e4m3 has 8 numbers to a power of two
            candidate = (number + step).clamp(1, most).to(torch.uint8).view(measured.dtype)
            factor = candidate.float() / size
            inside = (factor >= self.settings.smallest) & (factor <= self.settings.largest)
            if step and bool(inside.any()):
                yield _where(inside, candidate, measured)

    def _numbers_near(self, values: torch.Tensor, weight: Operand) -> Iterator[torch.Tensor]:
        measured = block_numbers(values, weight.format)
        yield weight.stored_blocks(measured)
        for factor in self._spread():
            yield weight.stored_blocks((measured * factor).clamp_min(torch.finfo(torch.float32).tiny))

    def _factors(self) -> list[float]:
        """Of the scale of `max`, which comes first: a tie is its."""
        own = self.settings
        if not own.power_of_two:
            return [1.0, *self._spread()]
        return [1.0, *(factor for e in range(-2, 31) if own.smallest <= (factor := 2.0**-e) <= own.largest and e)]

    def _spread(self) -> list[float]:
        own = self.settings
        return [float(f) for f in torch.linspace(own.smallest, own.largest, own.candidates, dtype=torch.float64)]

    def _range(self, operand: Operand, seen: Largest) -> torch.Tensor:
        """The range of an activation, from the histogram of its magnitudes."""
        assert isinstance(seen, Histogram)
        own, largest = self.settings, seen.value
        if own.power_of_two:
            exponents = range(int(-torch.tensor(own.smallest_range).log2().floor()) + 1)
            base = scale_of(largest, operand.config, True) * operand.format.global_max
            tried = torch.stack([base * 2.0**-e for e in exponents if 2.0**-e >= own.smallest_range])
        else:
            # finer than for weights: a histogram is small
            factors = torch.logspace(0, 1, 4 * own.candidates + 1, own.smallest_range, dtype=torch.float64)
            tried = (largest.double() * factors).float()
            tried[0] = largest
        filled = seen.counts.nonzero().flatten()
        counts, centers = seen.counts[filled], (filled.double() + 0.5) * seen.width
        centers = centers.clamp(max=float(largest)).float()  # the last one: nothing is larger
        scales = torch.stack([scale_of(amax, operand.config, own.power_of_two) for amax in tried])
        rounded = operand.format.nearest(centers / scales[:, None]) * scales[:, None]
        errors = ((rounded - centers).double().square() * counts).sum(1)
        return tried[int(_least(errors[:, None])[0])]


def _error(
    x: torch.Tensor, in_units: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor, fmt: Format
) -> torch.Tensor:
    """Squared errors of rounding `x` with `scale`, in units whose squares neither overflow nor vanish."""
    return fmt.nearest(x / scale).mul_(scale / unit).sub_(in_units).square_()


def _row_errors(values: torch.Tensor, scales: torch.Tensor, unit: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Sum of the squared errors of each row with each of some scales, in float64.

    Args:
        values: `[..., N, K]`. scales: `[C, ..., N, 1]`, or `[C]`; `unit` the same without C.

    Returns:
        `[C, ..., N, 1]`.
    """
    flat, count = values.reshape(-1, values.shape[-1]), scales.shape[0]
    scales, unit = scales.reshape(count, -1, 1), unit.reshape(-1, 1)
    step, found = max(1, _PIECE // max(1, flat.shape[1])), []
    for start in range(0, flat.shape[0], step):
        rows = slice(start, start + step)
        piece, own = flat[rows].float(), unit[rows] if unit.shape[0] > 1 else unit
        in_units = piece / own
        tried = scales[:, rows] if scales.shape[1] > 1 else scales
        parts = [_error(piece, in_units, scale, own, fmt).sum(-1, dtype=torch.float64) for scale in tried]
        found.append(torch.stack(parts))
    return torch.cat(found, 1).reshape(count, *values.shape[:-1], 1)


def _pieces(values: torch.Tensor, fmt: Format) -> Iterator[torch.Tensor]:
    """Matrices that hold whole blocks, of a weight or of the weights of experts."""
    high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
    matrices = values.flatten(0, -3) if high > 1 and values.ndim > 2 else [values.reshape(-1, values.shape[-1])]
    for matrix in matrices:
        step = max(1, _PIECE // max(1, matrix.shape[1]) // high) * high
        for start in range(0, matrix.shape[0], step):
            yield matrix[start : start + step]


def _in_blocks(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """`[M, K]` -> `[..., elements of a block]`, blocks that are cut filled up with zeros, whose error is none."""
    *_, width = fmt.sizes
    high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
    rows, columns = values.shape
    whole = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % high))
    if high == 1:
        return whole.reshape(rows, -1, width)
    return whole.reshape(-1, high, whole.shape[1] // width, width).transpose(1, 2).flatten(2)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.where of numbers that some kernels do not know."""
    if a.dtype.itemsize > 1:
        return torch.where(condition, a, b)
    return torch.where(condition, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)


def _least(errors: torch.Tensor) -> torch.Tensor:
    """Index of the least along the first axis, the first of equal ones."""
    least = errors.amin(0)
    return (errors == least).int().argmax(0)
