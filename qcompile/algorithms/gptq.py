"""`gptq`: codes of weights that make up for each other's errors, by the second moment of the layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch.fx import Node

from passes.codes import block_scale_numbers, rows_together
from passes.formats import Format
from passes.ir import block_amax, block_scale_values
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import WEIGHTS, Algorithm, Operand, Seen, View, quantizer
from qcompile.algorithms.feedback import Feedback, feedback_of, rounded
from qcompile.algorithms.hessian_mse import HessianMseSettings, weighed_by
from qcompile.algorithms.inputs import InputMoments, tell_few_tokens, watch_inputs
from qcompile.algorithms.mse import MseSettings
from qcompile.algorithms.search import ScaleSearch
from qcompile.algorithms.settings import Settings
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import CalibrationError
from qcompile.messages import some

Scales = Literal["max", "mse", "hessian_mse"]


class GptqSettings(Settings):
    """`gptq`: weights are rounded a column at a time, and what is left makes up for the error."""

    algorithm: Literal["gptq"]
    """`gptq`: codes of weights, rounded a column at a time, so that the columns that are left make up for the error as
    far as the second moment of the layer's inputs tells (Frantar et al. 2022). Ranges of activations stay those of
    `max`."""
    scales: Scales = "hessian_mse"
    """How the scales that weights are rounded with are found, of a tensor, of channels and of blocks: before the first
    column is rounded."""
    damping: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)] = 0.01
    """What is added to the diagonal of the second moment, as a part of its mean: the more, the nearer the codes are to
    those next to the weight. Ten times as much is added where that is singular."""
    order: Literal["activation", "none"] = "activation"
    """Columns with the largest inputs first, or from left to right. The scales of blocks stay in their places."""
    block: Annotated[int, Field(ge=1, le=8192)] = 128
    """How many columns are rounded before their errors are added to all others. It does not change what is computed,
    only how fast."""
    double: bool = False
    """Compute in float64: twice the time and memory, and in general the same codes but for a few in a million."""
    sequential: bool = False
    """Solve the blocks that the model repeats one after another, each with inputs as quantized ones before it give
    them: data is walked once for each block, half the model on average."""


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

    def instead(self, earlier: Algorithm[Any]) -> str:
        name = earlier.settings.algorithm
        return f"say {{algorithm: gptq, scales: {name}}}" if name in get_args(Scales) else super().instead(earlier)

    def watch(self, view: View) -> dict[Node, Statistic]:
        return watch_inputs(view.weights, lambda weight: None, double=self.settings.double)

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        moments = InputMoments(view.weights, seen)
        found = self._scales(view, moments)
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
        power_of_two = self.settings.power_of_two
        if self.settings.scales == "mse":
            return ScaleSearch(MseSettings(algorithm="mse", power_of_two=power_of_two)).weights(view)
        if self.settings.scales == "hessian_mse":
            settings = HessianMseSettings(algorithm="hessian_mse", power_of_two=power_of_two)
            return ScaleSearch(settings, weighed_by(moments)).weights(view)
        largest = {weight: quantizer(weight, view.amax(weight), power_of_two) for weight in view.weights}
        return {weight: _measured(weight, chosen) for weight, chosen in largest.items()}

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
            scales = [_scales(weight, chosen[weight], expert) for weight, _, expert in parts]
            rows = [len(own) for own in values]
            scale_of = _of_column([own.to(device) for own in scales], rows, fmt)
            numbers = rounded(torch.cat(values), feedback, scale_of, fmt, self.settings.block)
            for (_, n, expert), own in zip(parts, torch.split(numbers, rows), strict=True):
                target = found[n] if found[n].ndim == 2 else found[n][expert]
                target.copy_(fmt.encode(own.contiguous()))
        return found

    def _feedbacks(
        self, weight: Operand, moments: InputMoments, device: torch.device
    ) -> Iterator[tuple[list[int], Feedback]]:
        """How columns are rounded: of each expert, or of all (no number) at once."""
        parts = moments.blocks(weight, weight.shape[-1])
        assert parts is not None
        dtype = torch.float64 if self.settings.double else torch.float32
        for expert in range(len(parts)):
            by_size = self.settings.order == "activation"
            own = feedback_of(parts[expert, 0].to(device), self.settings.damping, by_size=by_size, dtype=dtype)
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


def _of_column(scales: Sequence[torch.Tensor], rows: Sequence[int], fmt: Format) -> Callable[[int], torch.Tensor]:
    """The scale of each row in a column of weights that are rounded together, `rows` of each."""
    whole = torch.cat([own.expand(count, -1) for own, count in zip(scales, rows, strict=True)]).T.contiguous()
    if not fmt.sizes:
        return lambda column: whole[0]
    return lambda column: whole[column // fmt.sizes[-1]]


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
            size = block_amax(values, fmt) / fmt.max
            parts.append(torch.where(size < torch.finfo(torch.float32).tiny, 1.0, size))
    return Quantizer(fmt, chosen.scale, torch.cat(parts), amax=chosen.amax)
