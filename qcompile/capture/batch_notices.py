"""What calibration data is too narrow for: told as notices, as no number shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.graph import shape
from qcompile.messages import some


class BatchLog:
    """What the batches of a calibration were like.

    Attributes:
        batches: how many there were. samples: sum of their sizes. tokens: of `input_ids`, those that an
            `attention_mask` shows.

    Args:
        program: what they are run through. placeholders: its user inputs.
    """

    def __init__(self, program: ExportedProgram, placeholders: Sequence[Node]) -> None:
        self._ranges = {str(symbol): r for symbol, r in program.range_constraints.items()}
        self._placeholders = placeholders
        self.batches = self.samples = self.tokens = 0
        self._unit = "images" if any(node.name == "pixel_values" for node in placeholders) else "samples"
        self._zeros: list[str] = []
        self._sizes: dict[tuple[str, int], set[int]] = defaultdict(set)

    def add(self, inputs: Sequence[Any], name: str) -> None:
        """Note one batch, called `name` in messages."""
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        self.batches += 1
        self.samples += max((t.shape[0] for t in tensors if t.ndim), default=1)
        tokens = any(node.name == "input_ids" for node in self._placeholders)  # the floats are then a cache
        floats = [t for t in tensors if t.is_floating_point() and t.numel() and not tokens]
        numbers = floats or [t for t in tensors if t.numel() and t.dtype != torch.bool]
        if numbers and not any(bool(t.any()) for t in numbers):
            self._zeros.append(name)
        named = {node.name: value for node, value in zip(self._placeholders, inputs, strict=True)}
        self.tokens += _tokens(named.get("input_ids"), named.get("attention_mask"))
        for node, value in zip(self._placeholders, inputs, strict=True):
            if isinstance(value, torch.Tensor):
                for axis, size in enumerate(value.shape):
                    self._sizes[node.name, axis].add(size)

    def facts(self) -> dict[str, Any]:
        """What `join` has to know of each process."""
        return {name: value for name, value in vars(self).items() if name not in ("_ranges", "_placeholders", "_unit")}

    def join(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Know what several processes saw together, each of the n of them every n-th batch."""
        for name in ("batches", "samples", "tokens"):
            setattr(self, name, sum(own[name] for own in facts))
        zeros = (name for own in facts for name in own["_zeros"])
        self._zeros = sorted(zeros, key=lambda name: int(name.split()[2]))  # calibration batch 12
        self._sizes = defaultdict(set)
        for own in facts:
            for axis, sizes in own["_sizes"].items():
                self._sizes[axis] |= sizes

    def counted(self) -> str:
        """How many there were, for a progress bar."""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.samples} {self._unit}{tokens}"

    def notices(self) -> list[str]:
        """One sentence for each kind of gap."""
        found = []
        if self.samples == 1:
            found.append("calibration had one sample: the ranges are those of that alone")
        if self._zeros:
            found.append(f"{some(self._zeros)}: every number is 0, which tells nothing of the range of anything")
        return found + self._uncovered()

    def _uncovered(self) -> list[str]:
        """Dynamic sizes that the program takes and calibration had not; not those of the batch, whose samples are
        alike."""
        symbols: dict[str, tuple[Node, int]] = {}
        batch: set[str] = set()
        for node in self._placeholders:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            for axis, size in enumerate(shape(node)):
                if isinstance(size, torch.SymInt) and str(size) in self._ranges:
                    (batch.add(str(size)) if axis == 0 else symbols.setdefault(str(size), (node, axis)))
        found = []
        for symbol, (node, axis) in symbols.items():
            sizes, taken = sorted(self._sizes[node.name, axis]), self._ranges[symbol]
            low, high = int(taken.lower), taken.upper
            if symbol in batch or (sizes[0] <= low and str(high) == str(sizes[-1])):
                continue
            upper = f"to {high}" if str(high).isdigit() and int(high) < 1 << 31 else "on"
            told = ", ".join(map(str, sizes)) if len(sizes) < 4 else f"{sizes[0]} to {sizes[-1]}"
            empty = ", and 0 was not among them" if low == 0 and 0 not in sizes else ""
            found.append(
                f"axis {axis} of {node.name} was {told} in calibration, and the program takes {low} {upper}{empty}"
            )
        return found


def _tokens(ids: object, mask: object) -> int:
    if not isinstance(ids, torch.Tensor):
        return 0
    shown = isinstance(mask, torch.Tensor) and mask.shape == ids.shape and not mask.is_floating_point()
    return int((mask != 0).sum()) if shown and isinstance(mask, torch.Tensor) else ids.numel()
