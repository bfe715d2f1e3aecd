"""Quantized experts, one matrix each on the hub, as the batch of matrices that fused modules of transformers want."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qcompile.errors import CheckpointError
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme

logger = logging.getLogger("qcompile")

Read = Callable[[int, int], QuantizedWeight]
"""The weight of (part, expert)."""


class StackedLinears(torch.nn.Module):
    """Linear layers that read the same input, with their outputs side by side: those that one matrix cannot hold."""

    def __init__(self, parts: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[E or 1, M, K]` -> `[E, M, sum of N]`."""
        return torch.cat([part(x) for part in self.parts], -1)


def fuse_experts(
    name: str, schemes: Sequence[Scheme], rows: Sequence[int], experts: int, read: Read
) -> torch.nn.Module:
    """One module for the parts (gate and up, or down alone) of all experts; `x [E or 1, M, K] -> [E, M, sum of N]`.

    Codes and scales are those of the hub. One scale for each part of each expert becomes a scalar if all are equal,
    `[E, 1, 1]` if the parts agree, and one for each row otherwise. Parts stay matrices of their own if a seam would cut
    their blocks, or if they have different schemes or global scales. Only the input is different: all experts read the
    same tensor, so the largest of their input scales serves all of them, as in vLLM.

    Args:
        name: of the parameter, for the log.
        schemes, rows: scheme and N of each part.
        read: called once for each part of each expert.
    """
    if len(set(schemes)) > 1 or _cuts_blocks(schemes[0], rows[:-1]):
        parts = [
            fuse_experts(f"{name} (part {part})", [scheme], [size], experts, lambda _, e, part=part: read(part, e))  # type: ignore[misc]
            for part, (scheme, size) in enumerate(zip(schemes, rows, strict=True))
        ]
        return StackedLinears(parts)
    weight = _Stack(name, schemes[0], rows, experts).filled(read)
    if weight.global_scale is not None and weight.global_scale.ndim == 3 and weight.global_scale.shape[1] > 1:
        return StackedLinears([QuantizedLinear(part) for part in _split(weight, rows)])
    return QuantizedLinear(weight)


def _split(weight: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """The parts of a weight of two levels with a global scale for each row: back ends know one for each matrix."""
    assert weight.global_scale is not None
    pieces = [torch.split(tensor, list(rows), 1) for tensor in (weight.codes, weight.scale, weight.global_scale)]
    return [
        replace(weight, codes=codes.clone(), scale=scale.clone(), global_scale=global_scale[:, :1].clone())
        for codes, scale, global_scale in zip(*pieces, strict=True)
    ]


def _cuts_blocks(scheme: Scheme, rows: Sequence[int]) -> bool:
    """Whether a part ends within a block of rows, so that the next would begin in it."""
    sizes = scheme.weight.sizes
    return len(sizes) == 2 and any(size % sizes[0] for size in rows)


class _Stack:
    """Room for the codes and scales of all experts, filled one matrix at a time."""

    def __init__(self, name: str, scheme: Scheme, rows: Sequence[int], experts: int) -> None:
        self.name, self.scheme, self.rows, self.experts = name, scheme, rows, experts
        self.codes: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        parts = (experts, len(rows))
        self.scalars = {key: torch.ones(parts) for key in ("scale", "global_scale", "input_scale")}

    def filled(self, read: Read) -> QuantizedWeight:
        for expert in range(self.experts):
            row = scale_row = 0
            for part in range(len(self.rows)):
                weight = self._checked(read(part, expert), part, expert)
                self.codes = self._put(self.codes, weight.codes, expert, row, self.rows)
                if weight.scale.ndim == 2:
                    blocks = [-(-size * weight.scale.shape[0] // weight.codes.shape[0]) for size in self.rows]
                    self.scale = self._put(self.scale, weight.scale, expert, scale_row, blocks)
                    scale_row += weight.scale.shape[0]
                row += weight.codes.shape[0]
                for key, values in self.scalars.items():
                    value = getattr(weight, key)
                    if value is not None and value.ndim == 0:
                        values[expert, part] = value
        return self._weight()

    def _checked(self, weight: QuantizedWeight, part: int, expert: int) -> QuantizedWeight:
        """One that goes with those before: what is stored says whether a scale is per channel."""
        if self.codes is None:
            self.scheme = weight.scheme
        if weight.scheme != self.scheme:
            raise CheckpointError(
                f"{self.name}: part {part} of expert {expert} has one scale where others have one for each row, or the"
                " other way round; experts that are computed together need the same scheme"
            )
        return weight

    def _put(
        self, into: torch.Tensor | None, piece: torch.Tensor, expert: int, row: int, rows: Sequence[int]
    ) -> torch.Tensor:
        if into is None:
            into = piece.new_empty((self.experts, sum(rows), piece.shape[1]))
        into[expert, row : row + piece.shape[0]] = piece
        return into

    def _weight(self) -> QuantizedWeight:
        assert self.codes is not None
        two_levels = self.scheme.weight.scale is not None
        scale = self._per_part("scale") if self.scale is None else self.scale
        per_row = scale.ndim == 3 and not self.scheme.weight.sizes and scale.shape[1] > 1
        return QuantizedWeight(
            replace(self.scheme, per_channel=True) if per_row else self.scheme,
            self.codes,
            scale,
            self._per_part("global_scale") if two_levels else None,
            self._largest_input_scale() if self.scheme.has_input_scale else None,
        )

    def _per_part(self, key: str) -> torch.Tensor:
        values = self.scalars[key]
        if bool((values == values[0, 0]).all()):
            return values[0, 0].clone()
        if bool((values == values[:, :1]).all()):
            return values[:, :1, None].clone()
        return values.repeat_interleave(torch.tensor(self.rows), 1)[..., None]

    def _largest_input_scale(self) -> torch.Tensor:
        values = self.scalars["input_scale"]
        low, high = values.aminmax()
        if low != high:
            logger.info(
                "%s: the input scales of its experts lie between %.4g and %.4g; the largest is used for all, since they"
                " read one tensor",
                self.name,
                float(low),
                float(high),
            )
        return high.clone()
