"""The calibration of a directory of weights: the algorithms that need no data, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.legalize.scales import round_scale
from passes.quantize.insert import Quantizer
from qcompile.algorithms import ask
from qcompile.algorithms.base import Algorithm, Operand, View
from qcompile.algorithms.max import Max
from qcompile.algorithms.settings import MaxSettings
from qcompile.checkpoint.files.tensors import Stored
from qcompile.checkpoint.hub.layout import Part
from qcompile.checkpoint.write.codes import broken, largest_magnitude, pieces
from qcompile.checkpoint.write.plan import HOW_TO_CALIBRATE, Plan
from qcompile.errors import CalibrationError, CheckpointError
from qcompile.recipe.globs import WEIGHT


@dataclass(frozen=True, eq=False)
class StoredOperand(Operand):
    """A weight in a file, which calls it `key`."""

    key: str
    tensor: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        yield from pieces(self.tensor, multiple)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return scale  # checkpoints hold scales in float32

    def stored_blocks(self, scales: torch.Tensor) -> torch.Tensor:
        if self.format.rounds_scales and self.tensor.dtype.itemsize == 2:
            return round_scale(scales, self.tensor.dtype)[0].float()
        return super().stored_blocks(scales)

    def amax(self) -> torch.Tensor:
        if not self.per_channel:
            return largest_magnitude(self.tensor)
        try:
            return super().amax()
        except CalibrationError as error:
            raise broken(self.tensor) from error


class Solver:
    """Chooses the scales of weights when they are asked for, those that share one together.

    What was chosen for a weight is let go when it was handed out: codes are as large as the files.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[Sequence[str]],
        parts: Mapping[str, Sequence[Part]],
        stored: Mapping[str, Stored],
        steps: Sequence[Algorithm[Any]],
        power_of_two: bool,
    ) -> None:
        """
        Args:
            groups: layers that share a scale. parts: layer -> the weights of the hub that it is.
            steps: of the recipe. power_of_two: of scales that no step chooses.
        """
        self.plan, self.parts, self.stored, self.steps = plan, parts, stored, steps
        self.rest = Max(MaxSettings(power_of_two=power_of_two))
        self._groups = {name: list(group) for group in groups for name in group}
        self._found: dict[str, Quantizer] = {}

    def check(self) -> list[str]:
        """Raise `CheckpointError` for a step that needs data, or a graph, before anything is written.

        Returns what there is to say of steps that do without.
        """
        if not self.plan.schemes:
            return []
        notices = []
        name = next(iter(self.plan.schemes))
        view = self._view(name, self.parts[name][0])
        for step in self.steps:
            try:
                wants = bool(ask.watch(step, view) or ask.edits(step, view, {}))
            except CalibrationError:  # it asked for the graph
                wants = True
            if wants and step.without_data is not None:
                notices.append(step.without_data)
            elif wants:
                raise CheckpointError(
                    f"the recipe's algorithm {step.settings.algorithm} needs calibration data: {HOW_TO_CALIBRATE}"
                )
        return notices

    def quantizer(self, layer: str, part: Part) -> Quantizer:
        """The scales of one weight, and its codes if an algorithm chose them."""
        if part.key not in self._found:
            view = self._view(layer, part)
            quantizers: dict[Operand, Quantizer] = {}
            for step in self.steps:
                quantizers |= ask.solve(step, view.of(view.operands, quantizers), {})
            left = [operand for operand in view.operands if operand not in quantizers]
            quantizers |= self.rest.solve(view.of(left, quantizers), {})
            ask.check_groups(view, quantizers)
            for operand, quantizer in quantizers.items():
                assert isinstance(operand, StoredOperand)
                self._found[operand.key] = quantizer
        return self._found.pop(part.key)

    def _view(self, layer: str, part: Part) -> View:
        """Of a weight, and of all that it shares a scale with."""
        group = self._groups.get(layer)
        shared = [(name, one) for name in group for one in self.parts[name]] if group else [(layer, part)]
        configs = self.plan.configs
        operands = [
            StoredOperand(f"{one.name}.{WEIGHT}", "weight", configs[name], one.key, self.stored[one.key])
            for name, one in shared
        ]
        return View(operands, [operands] if group and operands[1:] else ())
