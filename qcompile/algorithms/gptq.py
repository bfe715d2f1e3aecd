"""`gptq`: codes of weights that make up for each other's errors, by the second moment of the layer's inputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch.fx import Node

from passes.codes import block_scale_numbers, rows_together
from passes.formats import Format
from passes.ir import block_numbers, block_scale_values
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import WEIGHTS, Algorithm, Operand, Seen, View, quantizer
from qcompile.algorithms.column_scales import KnownScales, SearchedScales
from qcompile.algorithms.feedback import Feedback, column_order, feedback_of, rounded
from qcompile.algorithms.hessian_mse import weighed_by
from qcompile.algorithms.inputs import InputMoments, tell_few_tokens, watch_inputs
from qcompile.algorithms.search import ScaleSearch, squares
from qcompile.algorithms.settings import GptqSettings, Scales, SearchSettings
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import CalibrationError
from qcompile.messages import some


class Gptq(Algorithm[GptqSettings]):
    """Weights that read one tensor are rounded together. Scales of all are found first, as another step would.

    A weight with no input that is kept, that of a convolution, gets its scales and is rounded to the nearest.
    """

    model = GptqSettings

    @property
    def chooses(self) -> frozenset[str]:
        return frozenset({WEIGHTS})

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    @property
    def without_data(self) -> str | None:
        if self.settings.without_data == "error":
            return None
        scales = "max" if self.settings.scales == "max" else "mse"
        return f"no calibration data for weights: they are rounded to the nearest with scales of {scales}, not by gptq"

    @property
    def memory(self) -> float | None:
        return self.settings.memory

    def instead(self, earlier: Algorithm[Any]) -> str:
        name = earlier.settings.algorithm
        return f"say {{algorithm: gptq, scales: {name}}}" if name in get_args(Scales) else super().instead(earlier)

    def watch(self, view: View) -> dict[Node, Statistic]:
        return watch_inputs(view.weights, lambda weight: None, double=self.settings.double)

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        moments = InputMoments(view.weights, seen)
        later = [weight for weight in view.weights if moments.key(weight) and self._searches(weight.format)]
        before = view.of([weight for weight in view.weights if weight not in later], view.quantizers)
        found = self._scales(before, moments) | _largest(view, later, self.settings.power_of_two)
        left = [weight.name for weight in view.weights if not moments.key(weight)]
        if left:
            view.notices.append(f"gptq rounds to the nearest where it saw no input of a linear layer: {some(left)}")
        tell_few_tokens(view, moments, lambda weight: weight.shape[-1])
        together: dict[Hashable, list[Operand]] = {}
        for weight in view.weights:
            if moments.key(weight):
                together.setdefault((moments.key(weight), weight.format), []).append(weight)
        for weights in together.values():
            for weight, own in zip(weights, self._codes(weights, found, moments), strict=True):
                found[weight] = replace(found[weight], codes=own)
        return found

    def _scales(self, view: View, moments: InputMoments) -> dict[Operand, Quantizer]:
        """Those that are found before the first column is rounded."""
        if self.settings.scales == "max":
            return _largest(view, view.weights, self.settings.power_of_two)
        weighed = self.settings.scales == "hessian_mse"
        return ScaleSearch(self._search, weighed_by(moments) if weighed else squares).weights(view)

    def _searches(self, fmt: Format) -> bool:
        """Whether scales are found when the turn of a block comes."""
        return len(fmt.sizes) == 1 and self.settings.order != "activation"

    @property
    def _search(self) -> SearchSettings:
        power_of_two = self.settings.power_of_two
        if self.settings.scales == "max":  # what a block measures, and nothing beside it
            return SearchSettings(algorithm="max", power_of_two=power_of_two, smallest=1, largest=1, candidates=2)
        return SearchSettings(algorithm=self.settings.scales, power_of_two=power_of_two)

    def _codes(
        self, weights: Sequence[Operand], chosen: Mapping[Operand, Quantizer], moments: InputMoments
    ) -> list[torch.Tensor]:
        """The codes of each of `weights`, which read one tensor."""
        fmt = weights[0].format
        device = next(values.device for _, values in weights[0].rows())
        found = [torch.empty(weight.codes_shape, dtype=fmt.storage, device=device) for weight in weights]
        for experts, feedback in self._feedbacks(weights[0], moments, device):
            parts = [(w, n, e) for n, w in enumerate(weights) for e in (experts or range(_experts(w)))]
            values = [_matrix(weight, expert) for weight, _, expert in parts]
            quantizers, rows = [chosen[weight] for weight, _, _ in parts], [len(own) for own in values]
            scale_of: KnownScales | SearchedScales
            if self._searches(fmt):
                wide = [q.scale if q.scale is None else q.scale.to(device) for q in quantizers]
                weighed = self.settings.scales == "hessian_mse"
                scale_of = SearchedScales(ScaleSearch(self._search), weighed, feedback, wide, rows, weights[0])
            else:
                known = [_scales(weight, chosen[weight], expert).to(device) for weight, _, expert in parts]
                scale_of = KnownScales(known, rows, fmt)
            step = max(1, self.settings.block // block_of(fmt)) * block_of(fmt)
            numbers = rounded(torch.cat(values), feedback, scale_of, fmt, step)
            for index, own in enumerate(torch.split(numbers, rows)):
                _, n, expert = parts[index]
                _place(found[n], expert).copy_(fmt.encode(own.contiguous()))
                scales = quantizers[index].block_scales
                if isinstance(scale_of, SearchedScales) and scales is not None:
                    _place(scales, expert).copy_(scale_of.stored(index))
        return found

    def _feedbacks(
        self, weight: Operand, moments: InputMoments, device: torch.device
    ) -> Iterator[tuple[list[int], Feedback]]:
        """How columns are rounded: of each expert, or of all (no number) at once."""
        parts = moments.blocks(weight, weight.shape[-1])
        assert parts is not None
        dtype = torch.float64 if self.settings.double else torch.float32
        for expert in range(len(parts)):
            moment = parts[expert, 0].to(device)
            order = column_order(moment.diagonal(), self.settings.order, block_of(weight.format))
            own = feedback_of(moment, self.settings.damping, order, dtype)
            if own is None:
                raise CalibrationError(
                    f"{weight.name}: the second moment of what the layer reads, with numbers up to"
                    f" {float(parts[expert].max()) ** 0.5:.3g}, has no Cholesky factors, whatever is added to it"
                )
            yield ([expert] if len(parts) > 1 else []), own


def _experts(weight: Operand) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


def _matrix(weight: Operand, expert: int) -> torch.Tensor:
    """`[N, K]` in the dtype that the weight has."""
    if len(weight.shape) == 2:
        return torch.cat([values for _, values in weight.rows()])
    return next(values[expert - rows.start] for rows, values in weight.rows() if rows.start <= expert < rows.stop)


def _scales(weight: Operand, chosen: Quantizer, expert: int) -> torch.Tensor:
    """The scales of rows and of blocks in them, `[N or 1, blocks]`, as codes are made with them."""
    fmt = weight.format
    if not fmt.sizes:
        assert chosen.scale is not None
        scale = weight.stored(chosen.scale).float()
        return scale[expert] if scale.ndim == 3 else scale.reshape(-1, 1)
    assert chosen.block_scales is not None
    numbers = block_scale_numbers(chosen.block_scales, chosen.scale, fmt)
    numbers = numbers[expert] if numbers.ndim == 3 else numbers
    high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
    return numbers.repeat_interleave(high, 0)[: weight.shape[-2]]


def block_of(fmt: Format) -> int:
    """How many columns share the scales of blocks along a row; 1 where there are none."""
    return fmt.sizes[0] if len(fmt.sizes) == 1 else 1


def _place(tensor: torch.Tensor, expert: int) -> torch.Tensor:
    return tensor[expert] if tensor.ndim == 3 else tensor


def _largest(view: View, weights: Iterable[Operand], power_of_two: bool) -> dict[Operand, Quantizer]:
    found = {weight: quantizer(weight, view.amax(weight), power_of_two) for weight in weights}
    return {weight: _measured(weight, chosen) for weight, chosen in found.items()}


def _measured(weight: Operand, chosen: Quantizer) -> Quantizer:
    """With the scales that blocks measure, where a format has some."""
    fmt = weight.format
    if not fmt.sizes:
        return chosen
    parts: list[Any] = []
    for _, values in weight.rows(rows_together(fmt, len(weight.shape))):
        if fmt.scale is not None:
            assert chosen.scale is not None
            parts.append(fmt.scale.encode(block_scale_values(values, chosen.scale, fmt)))
        else:
            parts.append(weight.stored_blocks(block_numbers(values, fmt)))
    return Quantizer(fmt, chosen.scale, torch.cat(parts), amax=chosen.amax)
