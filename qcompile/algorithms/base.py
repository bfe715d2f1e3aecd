"""What a calibration algorithm is, and what it sees.

A recipe has steps, each of them an algorithm with its settings. The driver (`qcompile.quantization.solve`) runs them:

    for step in steps:
        seen = observe(view, step.watch(view), batches)
        run(step.edits(view, seen))
        quantizers |= step.solve(view, seen)

and what none of them solved gets the scale of `max`. A step that watches nothing needs no data, and so it works on the
weights of a directory, too, where there is no graph: `save_checkpoint` shows it views of a few tensors at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.fx import GraphModule, Node

from passes.codes import rows_together
from passes.formats import Format
from passes.ir import block_numbers, powers_above
from passes.places import Pipeline
from passes.quantize.insert import Quantizer
from passes.quantize.sites import Site
from qcompile.algorithms import algorithm_called
from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.algorithms.settings import Settings
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.errors import CalibrationError, RecipeError
from qcompile.schemes.config import QuantizerConfig, format_of

WEIGHTS, RANGES = "weights", "ranges of activations"
"""What an algorithm can choose."""

Seen = Mapping[Node, Statistic]
"""What was kept of the nodes that an algorithm watched."""


@dataclass(frozen=True, eq=False)
class Operand(ABC):
    """A tensor that the recipe quantizes: a weight, or an activation whose constant scale calibration has to find.

    Attributes:
        name: of the quantizer, `layers.0.q_proj.weight_quantizer`.
        kind: `weight`, `input`, `output`, `q`, `k` or `v`.
        config: what the recipe says of it.
    """

    name: str
    kind: str
    config: QuantizerConfig

    @property
    def format(self) -> Format:
        return format_of(self.config)

    @property
    def per_channel(self) -> bool:
        """Whether each channel of a weight has a scale of its own."""
        return self.config.granularity == "per_channel"

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        """The axes of a weight along which the scale of a channel is one number: the last, but of a convolution."""
        return (-1,)

    @property
    def site(self) -> Site:
        """Where it is in the graph. Raises CalibrationError where there is none, as in a directory of weights."""
        raise CalibrationError(f"{self.name}: there is no graph here, and so no data")

    @property
    def node(self) -> Node:
        """What `watch` asks for to see this tensor. Raises CalibrationError as `site` does."""
        return self.site.tensor

    @property
    def dtype(self) -> torch.dtype:
        """What the program computes in. Raises CalibrationError as `site` does."""
        raise CalibrationError(f"{self.name}: there is no graph here, and so no dtype to compute in")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of a weight: `[N, K]`, of experts `[E, N, K]`, of a convolution `[N, C, ...]`."""

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the constant scale: `()`, and per channel of a weight `[..., N, 1]`, of a convolution `[N, 1, ...]`."""
        if not self.per_channel or self.kind != "weight":
            return ()
        reduced = {axis % len(self.shape) for axis in self.reduced_axes}
        return tuple(1 if axis in reduced else size for axis, size in enumerate(self.shape))

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Of a weight's codes: two of a packed format share a byte."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.format.packed else self.shape

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Of the scales of a weight's blocks, in a format that has some."""
        return (*self.shape[: -len(self.format.sizes)], *self.format.blocks(self.shape))

    @abstractmethod
    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """A weight some rows of its first axis at a time: (which, values). `multiple` rows belong together."""

    @abstractmethod
    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """`scale`, for a tensor or for channels, as the program will have it: rounded to the dtype that it computes in.
        Codes have to be chosen with that; of blocks they are `stored_blocks`."""

    def stored_blocks(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of blocks that are plain numbers as the program will have them, in float32: rounded as `stored` does,
        or up to powers of two, where the format says so."""
        if self.format.powers:
            return powers_above(scales)
        return self.stored(scales).float() if self.format.rounds_scales else scales

    def amax(self) -> torch.Tensor:
        """Largest magnitude of a weight, fp32: of each channel `[..., N, 1]` if these have scales, else a scalar; of a
        convolution `[N, 1, ...]`.

        Raises CalibrationError for a NaN or an infinity.
        """
        parts = []
        for _, values in self.rows():
            if not self.per_channel:
                low, high = torch.aminmax(values)
            elif len(self.reduced_axes) == 1:
                low, high = torch.aminmax(values, dim=self.reduced_axes[0], keepdim=True)
            else:
                low, high = values.amin(self.reduced_axes, keepdim=True), values.amax(self.reduced_axes, keepdim=True)
            parts.append(torch.maximum(-low, high).float())
        found = torch.cat(parts) if self.per_channel else torch.stack(parts).amax()
        if not bool(torch.isfinite(found).all()):  # aminmax carries a NaN on
            raise CalibrationError(f"{self.name}: the weight holds NaN or infinity")
        return found


@dataclass
class View:
    """What an algorithm sees of a model.

    Attributes:
        operands: everything that is quantized with a scale that has to be found.
        groups: weights whose (global) scales must agree, so that they can be merged and any server can load them as
            one: q, k and v of an attention, gate and up of an MLP. A weight that shares with none is in none.
        quantizers: what earlier steps chose.
        gm: the graph; None for weights of a directory.
        configs: all that the recipe quantizes in the graph, also what has no scale to be found.
        notices: what the user should know; algorithms add to it.
    """

    operands: Sequence[Operand]
    groups: Sequence[Sequence[Operand]] = ()
    quantizers: Mapping[Operand, Quantizer] = field(default_factory=dict)
    gm: GraphModule | None = None
    configs: Mapping[Site, QuantizerConfig] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    _amax: dict[Operand, torch.Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> list[Operand]:
        return [operand for operand in self.operands if operand.kind == "weight"]

    @property
    def activations(self) -> list[Operand]:
        """Those with a constant scale, if only a global one, that has to be found."""
        return [operand for operand in self.operands if operand.kind != "weight"]

    def group(self, operand: Operand) -> Sequence[Operand]:
        """The weights that share a scale with `operand`, itself among them."""
        return next((group for group in self.groups if operand in group), (operand,))

    def amax(self, weight: Operand) -> torch.Tensor:
        """`weight.amax()`, the largest of all where weights share a scale; read once."""
        for member in self.group(weight):
            if member not in self._amax:
                self._amax[member] = member.amax()
        own = self._amax[weight]
        if weight.per_channel or len(self.group(weight)) == 1:
            return own
        return torch.stack([self._amax[member] for member in self.group(weight)]).amax()

    def of(self, operands: Sequence[Operand], quantizers: Mapping[Operand, Quantizer]) -> View:
        """The part of this view that has `operands`, for a step behind others."""
        return View(operands, self.groups, quantizers, self.gm, self.configs, self.notices, self._amax)


_Settings = TypeVar("_Settings", bound=Settings)


class Algorithm(Generic[_Settings]):
    """One step of a recipe's calibration. A subclass says what differs from doing nothing.

    Attributes:
        model: the pydantic model of its settings, whose `algorithm` is its name in recipes.
        settings: what the recipe says.
    """

    model: ClassVar[type[Settings]]

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings

    @property
    def chooses(self) -> frozenset[str]:
        """Of what it chooses all scales, `WEIGHTS` or `RANGES` or both, if that is known: a step of which nothing stays
        behind later ones is refused."""
        return frozenset()

    @property
    def without_data(self) -> str | None:
        """What to tell the user where there is no data and the step does without: `edits` is not asked then, and
        `solve` sees nothing. None if what it watches is needed."""
        return None

    @property
    def memory(self) -> float | None:
        """The most bytes that what it watches may take at once, None if there is no limit: where it takes more, weights
        are shown to it in parts, those that share a tensor or a scale together, and data is walked for each part."""
        return None

    @property
    def sequential(self) -> bool:
        """Whether it solves weights segment by segment, each with inputs that the quantized ones before it give."""
        return False

    def instead(self, earlier: Algorithm[Any]) -> str:
        """What to write where this step leaves nothing of an `earlier` one, if there is something."""
        return "leave one of them out"

    def watch(self, view: View) -> dict[Node, Statistic]:
        """What to keep of which tensors over all batches: `{operand.node: Largest()}`. Nothing needs no data."""
        return {}

    def edits(self, view: View, seen: Seen) -> Pipeline:
        """Passes that change the graph. They keep the nodes of linear layers and attentions, whose operands may change;
        afterwards data runs through the graph anew, and no step before has chosen anything."""
        return Pipeline()

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        """Scales, and for weights codes. What is left out stays what steps before made of it."""
        return {}


def quantizer(operand: Operand, amax: torch.Tensor, power_of_two: bool) -> Quantizer:
    """The quantizer whose largest number is `amax`; blocks measure their own scales."""
    if operand.format.rounds_scales:
        return Quantizer(operand.format, None, _measured_blocks(operand))
    if not has_constant(operand.config):
        return Quantizer(operand.format, None)
    return Quantizer(operand.format, scale_of(amax, operand.config, power_of_two), amax=amax)


def _measured_blocks(weight: Operand) -> torch.Tensor:
    """The scale of each block of a weight, as the program will have it."""
    fmt = weight.format
    rows = weight.rows(rows_together(fmt, len(weight.shape)))
    return torch.cat([weight.stored_blocks(block_numbers(values, fmt)) for _, values in rows])


def ranges(
    view: View, seen: Seen, choose: Callable[[Operand, Largest], torch.Tensor] = lambda operand, largest: largest.value
) -> dict[Operand, torch.Tensor]:
    """Activation -> its range, less those that calibration never reached, or only with zeros.

    A layer that is called in two branches of which data took one has its range in the other, too.

    Args:
        choose: the range, from what was kept of an operand that has one.

    Raises:
        CalibrationError: there is a NaN or an infinity in one.
    """
    found: dict[Operand, torch.Tensor] = {}
    of_layer: dict[str, torch.Tensor] = {}
    for operand in view.activations:
        largest = seen[operand.node]
        assert isinstance(largest, Largest)
        if not bool(torch.isfinite(largest.value)):
            raise CalibrationError(
                f"{operand.name}: calibration found {float(largest.value)} in {operand.node.name}{largest.first_lost}"
            )
        found[operand] = choose(operand, largest) if float(largest.value) else largest.value
        of_layer[operand.name] = torch.maximum(of_layer.get(operand.name, found[operand]), found[operand])
    found = {operand: value if float(value) else of_layer[operand.name] for operand, value in found.items()}
    return {operand: value for operand, value in found.items() if float(value)}


def told(steps: Sequence[Algorithm[Any]]) -> list[str]:
    """A notice that says which algorithms chose the scales, where it was not `max` alone."""
    if all(step.settings.algorithm == "max" for step in steps):
        return []
    words = []
    for step in steps:
        own = step.settings.model_dump(exclude_defaults=True, exclude={"algorithm"})
        settings = ", ".join(f"{name} {value}" for name, value in own.items())
        words.append(step.settings.algorithm + (f" ({settings})" if settings else ""))
    return [f"scales were chosen by {', then '.join(words)}"]


def make(settings: Sequence[Settings]) -> tuple[Algorithm[Any], ...]:
    """The steps of a recipe, ready to run.

    Raises:
        RecipeError: one of them would be without effect.
    """
    steps = tuple(algorithm_called(step.algorithm)(step) for step in settings)
    for index, step in enumerate(steps):
        name = step.settings.algorithm
        if type(step).edits is not Algorithm.edits and name in {one.settings.algorithm for one in steps[:index]}:
            raise RecipeError(f"calibration[{index}]: {name} has edited the graph already: leave one of the two out")
        left = set(step.chooses)
        for later in steps[index + 1 :]:
            left -= later.chooses
            if step.chooses and not left:
                other = later.settings.algorithm
                raise RecipeError(
                    f"calibration[{index}]: nothing that {name} chooses ({' and '.join(sorted(step.chooses))}) is left"
                    f" behind {other}: {later.instead(step)}"
                )
    return steps
