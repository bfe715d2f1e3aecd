"""What SmoothQuant and AWQ share: factors for the channels that some linear layers read, tried on held-out rows.

Each group of layers that read one tensor has one factor a channel. The algorithms say which are tried; the one with the
least error of the layers' outputs wins, with the quantizers of the recipe in the input and the weights, and if leaving
the group alone is as good, it is left alone. `SmoothLinears` then edits the graph.

Factors and ranges that are tried are those of an eighth of the data, and errors those of rows of the rest: with an
exponent near 1 every channel just reaches the range, and what calibration did not see, text of another kind above all,
leaves it. What wins is made of all data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch.fx import Node

from passes.absorb import Absorber, find_absorber
from passes.graph import aten, is_call, place_of
from passes.pipelines import smooth_pipeline
from passes.place.smooth import Smoothing, unfit
from passes.places import Pipeline
from qcompile.algorithms.base import Algorithm, Operand, Seen, View
from qcompile.algorithms.channels import Channels, Sizes
from qcompile.algorithms.settings import SmoothingSettings
from qcompile.algorithms.simulate import rounded
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import CalibrationError
from qcompile.schemes.config import QuantizerConfig

__all__ = ["Group", "Smoother", "column_magnitudes", "pieces"]

_WORTH = 0.995  # of the error without: a factor that gains less is not worth an edit
_REACH = 12  # powers of two that a factor can be away from 1: half precision has room for them


_Settings = TypeVar("_Settings", bound=SmoothingSettings)


@dataclass(frozen=True, eq=False)
class Group:
    """Linear layers that read one tensor, and whose weights are quantized.

    Attributes:
        weights: of each. input: how their input is quantized; None if it is not.
        beside: layers that read it, too, and are not quantized: their weights get the factor, so that it can go.
        absorber: where the factor goes; the reason why it stays a multiplication.
    """

    weights: Sequence[Operand]
    input: QuantizerConfig | None
    absorber: Absorber | str
    beside: tuple[Node, ...] = ()

    @property
    def linears(self) -> tuple[Node, ...]:
        return (*(weight.site.consumer for weight in self.weights), *self.beside)

    @property
    def tensor(self) -> Node:
        found = self.linears[0].args[0]
        assert isinstance(found, Node)
        return found

    @property
    def name(self) -> str:
        """`layers.0.self_attn.q_proj+k_proj+v_proj`."""
        first, *others = (weight.site.module for weight in self.weights)
        return "+".join([first, *(other.rpartition(".")[2] for other in others)])

    def shared(self, values: torch.Tensor) -> torch.Tensor:
        """`[K]` with the largest of the channels that have one factor: those of the heads of a key/value head."""
        if isinstance(self.absorber, str) or self.absorber.repeats == 1:
            return values
        heads = values.view(-1, self.absorber.repeats, self.absorber.width)
        return heads.amax(1, keepdim=True).expand_as(heads).flatten()


@dataclass(frozen=True)
class _Choice:
    """The best of a group: the exponent, what the input is multiplied by, and the error as a part of that without."""

    alpha: float
    factor: torch.Tensor
    error: float


class Smoother(Algorithm[_Settings]):
    """A subclass says which factor an exponent makes."""

    @abstractmethod
    def size(self, sizes: Sizes) -> torch.Tensor:
        """How large each channel of an input is, `[K]`."""

    def rounds_input(self, config: QuantizerConfig) -> bool:
        """Whether exponents are told apart with the input rounded so. Whether the best of them is better than nothing
        is always judged with it."""
        return True

    def columns(self, weights: Sequence[Operand]) -> torch.Tensor:
        """How large each column of weights that have one factor is, `[K]`: its largest magnitude."""
        return torch.stack([column_magnitudes(weight) for weight in weights]).amax(0)

    @abstractmethod
    def divisor(self, alpha: float, size: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What the channels are divided by, `[K]`, for an exponent; `size` and `columns` as above."""

    @property
    def without_data(self) -> str | None:
        if self.settings.without_data == "error":
            return None
        return f"no calibration data for weights: {self.settings.algorithm} is left out"

    def watch(self, view: View) -> dict[Node, Statistic]:
        has_weights = any(site.operand == "weight" for site in view.configs)
        if not has_weights and self.without_data is None:
            raise CalibrationError(
                f"{self.settings.algorithm} changes weights by what data shows, and no weight is quantized here: give"
                " the batches to quantize(calibration=...), as ranges of activations do not say it"
            )
        groups, _ = self._groups(view)
        return {group.tensor: Channels(self.settings.rows) for group in groups}

    def edits(self, view: View, seen: Seen) -> Pipeline:
        groups, left = self._groups(view)
        choices: dict[Group, _Choice] = {}
        for group in groups:
            found = seen[group.tensor]
            assert isinstance(found, Channels)
            fits = self.settings.multiply or not isinstance(group.absorber, str)
            choice = self._choose(group, found) if found.count and fits else None
            if choice is not None:
                choices[group] = choice
        smoothings = [Smoothing(group.linears, choice.factor) for group, choice in choices.items()]
        return smooth_pipeline(smoothings, left, self._told(groups, choices)) if groups or left else Pipeline()

    def _groups(self, view: View) -> tuple[list[Group], dict[Node, str]]:
        return _groups(view)

    def _choose(self, group: Group, seen: Channels) -> _Choice | None:
        own, trial = self.settings, _Trial(group, seen, self.settings.power_of_two)
        columns = group.shared(self.columns(group.weights))

        def factor(alpha: float, sizes: Sizes) -> torch.Tensor:
            return self._factor(alpha, group.shared(self.size(sizes)), columns)

        @cache
        def error(alpha: float, rounds_input: bool) -> float:
            return trial.error(factor(alpha, seen.fitting), rounds_input)

        rounds = group.input is None or self.rounds_input(group.input)
        best = own.alpha if own.alpha is not None else _least(lambda alpha: error(alpha, rounds), own.steps)
        before, after = trial.error(torch.ones_like(columns), True), error(best, True)
        if own.alpha is None and not after < before * _WORTH:
            return None
        return _Choice(best, factor(best, seen.sizes), after / before if before else 1.0)

    def _factor(self, alpha: float, size: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What the input is multiplied by: around 1, with 8 bits, which any dtype holds; 1 for dead channels."""
        live = (size > 0) & (columns > 0)
        if not bool(live.any()):
            return torch.ones_like(size)
        divisor = self.divisor(alpha, size.where(live, 1), columns.where(live, 1)).log2()
        low, high = torch.aminmax(divisor[live])
        exponent = torch.where(live, (low + high) / 2 - divisor, 0).clamp(-_REACH, _REACH)
        return torch.exp2(exponent.round() if self.settings.power_of_two else exponent).bfloat16().float()

    def _told(self, groups: Sequence[Group], choices: dict[Group, _Choice]) -> str:
        words = []
        for group, choice in choices.items():
            where = "*" if isinstance(group.absorber, str) else f"in {place_of(group.absorber.node)}"
            words.append(f"{group.name} {choice.alpha:.2g} ({choice.error:.2f}, {where})")
        name = self.settings.algorithm
        if not words:
            return f"{name}: no exponent helps any of {len(groups)} groups of layers, which stay as they are"
        return (
            f"{name}: {len(choices)} of {len(groups)} groups of layers have factors; exponent (error of their outputs"
            f" over that without, and the layer that the factor is in, * if it is a multiplication): {', '.join(words)}"
        )


class _Trial:
    """The error of a group's outputs on held-out rows, for one factor after another."""

    def __init__(self, group: Group, seen: Channels, power_of_two: bool) -> None:
        self.group, self.power_of_two = group, power_of_two
        self.rows, self.magnitudes = seen.held_out, seen.fitting.largest
        if not bool(seen.sizes.largest.isfinite().all()):
            raise CalibrationError(
                f"{group.name}: calibration found NaN or infinity in {group.tensor.name}, its input{seen.first_lost}"
            )
        self._each = [column_magnitudes(weight) for weight in group.weights]
        self._outputs = [[self.rows @ piece.T for piece in pieces(weight)] for weight in group.weights]

    def error(self, factor: torch.Tensor, rounds_input: bool) -> float:
        """Sum over the layers of the squared error of their outputs, as a part of the squared outputs."""
        x = self.rows * factor
        if rounds_input and self.group.input is not None:
            x = rounded(x, self.group.input, (self.magnitudes * factor).amax(), self.power_of_two)
        largest = [(columns / factor).amax() for columns in self._each]
        together = torch.stack(largest).amax()
        total = 0.0
        for weight, outputs in zip(self.group.weights, self._outputs, strict=True):
            found = energy = 0.0
            for piece, output in zip(pieces(weight), outputs, strict=True):
                w = piece / factor
                amax = w.abs().amax(-1, keepdim=True) if weight.per_channel else together
                made = x @ rounded(w, weight.config, amax, self.power_of_two).T
                found += float(made.sub_(output).square_().sum())
                energy += float(output.square().sum())
            total += found / energy if energy else 0.0
        return total


def _least(error: Callable[[float], float], steps: int) -> float:
    """The multiple of 1 / `steps` from 0 to 1 with the least error: every fourth is tried, then what is between those
    beside the best."""
    stride, found = 4, min(range(0, steps + 1, 4), key=lambda step: error(step / steps))
    while stride > 1:
        stride //= 2
        near = (found, max(0, found - stride), min(steps, found + stride))
        found = min(near, key=lambda step: error(step / steps))
    return found / steps


def _groups(view: View) -> tuple[list[Group], dict[Node, str]]:
    """The groups of a graph, and the layers that have a weight and are in none, with the reason."""
    readers: dict[Node, list[Operand]] = {}
    left: dict[Node, str] = {}
    for weight in view.weights:
        node = weight.site.consumer
        if weight.site.operator.kind == "convolution":
            continue  # nothing that was to be expected here
        if not is_call(node, aten.linear.default):
            left[node] = f"inputs of layers of kind {weight.site.operator.kind} are not smoothed, those of linear are"
        elif reason := unfit(node):
            left[node] = reason
        else:
            x = node.args[0]
            assert isinstance(x, Node)
            readers.setdefault(x, []).append(weight)
    inputs = {site.consumer: config for site, config in view.configs.items() if site.operand == "input"}
    return [_group(weights, inputs.get(weights[0].site.consumer)) for weights in readers.values()], left


def _group(weights: Sequence[Operand], config: QuantizerConfig | None) -> Group:
    linears = [weight.site.consumer for weight in weights]
    x = linears[0].args[0]
    assert isinstance(x, Node)
    beside = [user for user in x.users if user not in linears]
    if beside and all(is_call(user, aten.linear.default) and user.args[0] is x and not unfit(user) for user in beside):
        absorber = find_absorber(x, [*linears, *beside])
        if isinstance(absorber, Absorber):
            return Group(weights, config, absorber, tuple(beside))
    return Group(weights, config, find_absorber(x, linears))


def pieces(weight: Operand) -> Iterator[torch.Tensor]:
    """The rows of a weight, some at a time, in float32."""
    sizes = weight.format.sizes
    for _, values in weight.rows(sizes[0] if len(sizes) == 2 else 1):
        yield values.float().cpu()


def column_magnitudes(weight: Operand) -> torch.Tensor:
    """Of each column of a weight the largest, `[K]`."""
    return torch.stack([piece.abs().amax(0) for piece in pieces(weight)]).amax(0)
