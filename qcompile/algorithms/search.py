"""The search for the scale of a weight: candidates around that of `max`, and the error that each of them leaves.

What differs between algorithms is how errors are weighed (`Weighing`); the candidates are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from passes.codes import block_scale_numbers, rows_together
from passes.formats import Format
from passes.ir import block_numbers, block_scale_values
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import Operand, View
from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.algorithms.settings import SearchSettings

__all__ = ["ScaleSearch", "Weighing", "least"]

_PIECE = 1 << 16  # elements that are tried at once: larger intermediates leave the caches


class Weighing:
    """What an error counts: its square."""

    def rows(self, errors: torch.Tensor) -> torch.Tensor:
        """`[M, K]` -> what each row counts, `[M, 1]` in float64."""
        return errors.square_().sum(-1, keepdim=True, dtype=torch.float64)

    def blocks(self, errors: torch.Tensor, fmt: Format) -> torch.Tensor:
        """`[M, n, elements of a block]`, blocks of `fmt` in rows -> what each block counts, `[M, n]`."""
        return errors.square_().sum(-1)


Weigh = Callable[[Operand, int], Weighing]
"""How the errors of a weight are weighed, and of an expert of it."""


def squares(weight: Operand, expert: int) -> Weighing:
    return Weighing()


class ScaleSearch:
    """Searches the scales of weights row by row, block by block, or as a whole; those that share one together.

    The scale of `max` is among the candidates, and wins where no other is better, so the error is never larger than
    with `max`.
    """

    def __init__(self, settings: SearchSettings, weigh: Weigh = squares) -> None:
        self.settings, self.weigh = settings, weigh

    def weights(self, view: View) -> dict[Operand, Quantizer]:
        """The scales of all weights of `view`."""
        found = {weight: self._weight(view, weight) for weight in view.weights if not _is_shared(view, weight)}
        for group in view.groups:
            members = [weight for weight in group if weight in view.operands and _is_shared(view, weight)]
            if members:
                found |= dict.fromkeys(members, self._tensor(members, view.amax(members[0])))
        return found

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
            for at, expert, values in _matrices(weight):
                weighing = self.weigh(weight, expert)
                if first.per_channel:
                    found = _row_errors(values, stored[:, at], base[at], first.format, weighing)
                    errors[:, at] += found.reshape(errors[:, at].shape)
                else:
                    errors += _row_errors(values, stored, base, first.format, weighing).flatten(1).sum(1)
        errors = errors.where(torch.isfinite(stored) & (stored > 0), torch.inf)
        return Quantizer(first.format, scales.gather(0, least(errors).unsqueeze(0)).squeeze(0), amax=amax)

    def _blocks(self, view: View, weight: Operand) -> Quantizer:
        """The scales of blocks, under the global one of `max` where the format has it."""
        fmt, amax = weight.format, view.amax(weight)  # which finds a NaN
        scale = None
        if has_constant(weight.config):
            scale = scale_of(amax, weight.config, self.settings.power_of_two)
        parts = [
            self.block_scales(piece.float(), scale, weight, self.weigh(weight, expert))
            for _, expert, values in _matrices(weight)
            for piece in _pieces(values, fmt)
        ]
        return Quantizer(fmt, scale, torch.cat(parts).reshape(weight.blocks_shape), amax=amax)

    def block_scales(
        self, values: torch.Tensor, scale: torch.Tensor | None, weight: Operand, weighing: Weighing
    ) -> torch.Tensor:
        """`[M, K]` -> the best scale of each block, as it is stored."""
        fmt = weight.format
        candidates = self._codes_near(values, scale, fmt) if scale is not None else self._numbers_near(values, weight)
        blocks, best, fewest = _in_blocks(values, fmt), None, torch.empty(())
        unit = torch.empty(())
        for candidate in candidates:
            own = block_scale_numbers(candidate, scale, fmt).unsqueeze(-1)
            if best is None:
                best, unit, in_units = candidate, own, blocks / own
                fewest = weighing.blocks(_error(blocks, in_units, own, own, fmt), fmt)
                continue
            error = weighing.blocks(_error(blocks, in_units, own, unit, fmt), fmt)
            better = error < fewest
            best, fewest = _where(better, candidate, best), torch.where(better, error, fewest)
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


def _is_shared(view: View, weight: Operand) -> bool:
    """Whether one scale for several whole weights is searched; a global scale above blocks stays that of `max`."""
    return not weight.format.sizes and len(view.group(weight)) > 1


def _error(
    x: torch.Tensor, in_units: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor, fmt: Format
) -> torch.Tensor:
    """Errors of rounding `x` with `scale`, in units in which their squares neither overflow nor vanish."""
    return fmt.nearest(x / scale).mul_(scale / unit).sub_(in_units)


def _row_errors(
    values: torch.Tensor, scales: torch.Tensor, unit: torch.Tensor, fmt: Format, weighing: Weighing
) -> torch.Tensor:
    """What the errors of each row count with each of some scales, in float64.

    Args:
        values: `[N, K]`. scales: of each row `[C, N, ...]`, or `[C]`; `unit` the same without C.

    Returns:
        `[C, N, 1]`.
    """
    count = scales.shape[0]
    scales, unit = scales.reshape(count, -1, 1), unit.reshape(-1, 1)
    step, found = max(1, _PIECE // max(1, values.shape[1])), []
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        piece, own = values[rows].float(), unit[rows] if unit.shape[0] > 1 else unit
        in_units = piece / own
        tried = scales[:, rows] if scales.shape[1] > 1 else scales
        found.append(torch.stack([weighing.rows(_error(piece, in_units, scale, own, fmt)) for scale in tried]))
    return torch.cat(found, 1)


def _matrices(weight: Operand) -> Iterator[tuple[slice | int, int, torch.Tensor]]:
    """The matrices `[M, K]` of a weight, each with its place along the first axis and the expert that it is of."""
    one, convolution = len(weight.shape) == 2, len(weight.reduced_axes) > 1
    for rows, values in weight.rows(rows_together(weight.format, len(weight.shape))):
        if one or convolution:  # of which the first axis has the channels
            yield rows, 0, values.flatten(1)
            continue
        for expert, matrix in enumerate(values, rows.start):
            yield expert, expert, matrix


def _pieces(matrix: torch.Tensor, fmt: Format) -> Iterator[torch.Tensor]:
    """Rows of a matrix that hold whole blocks."""
    high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
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


def least(errors: torch.Tensor) -> torch.Tensor:
    """Index of the least along the first axis, the first of equal ones."""
    fewest = errors.amin(0)
    return (errors == fewest).int().argmax(0)
