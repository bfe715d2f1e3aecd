"""What is kept of one tensor over all calibration batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from passes.ir import repeat_kv
from passes.sdpa import HIDDEN, fully_masked


class Statistic:
    """A running summary of what a node makes.

    Attributes:
        additive: whether a sample that is seen twice counts twice, as in sums and histograms. Then pieces of batches
            come with a weight, and are cut so that all of their samples have the same.
    """

    additive: ClassVar[bool] = False

    @abstractmethod
    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        """Add one run.

        Args:
            result: what the node made. args: its arguments, as they were used.
            weight: what each sample in it counts: 1/n if the run holds every sample n times.
        """


class Largest(Statistic):
    """Largest magnitude.

    Attributes:
        value: over all elements, a float32 scalar; NaN or infinity if one of them is. finite: over those that are
            finite. reached: whether there was an element at all.
    """

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.float32)
        self.finite = 0.0
        self.reached = False

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        if not result.numel():
            return
        self.reached = True
        self.add(self.magnitude(result.detach()))

    def add(self, largest: torch.Tensor) -> None:
        largest = largest.float().cpu()
        self.value = torch.maximum(self.value, largest)  # which carries a NaN on
        if bool(torch.isfinite(largest)):
            self.finite = max(self.finite, float(largest))

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(x)
        largest = torch.maximum(-low, high)
        if not bool(torch.isfinite(largest)):
            self.finite = max(self.finite, float(torch.where(x.isfinite(), x, 0).abs().max()))
        return largest


class LargestBeforeSoftmax(Largest):
    """Largest magnitude, not counting what a mask made so negative that its probability is zero.

    A number below `-limit` becomes an infinity, which hides as well, but where a whole row is below it.
    """

    def __init__(self, axis: int | None, limit: float) -> None:
        """`axis` is that of the softmax, None where something stands in between."""
        super().__init__()
        self.axis, self.limit = axis, limit

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(x)
        if not bool(low < HIDDEN):
            return super().magnitude(x)
        rows = x.amax(self.axis) if self.axis is not None else high
        lost = rows[rows.isfinite() & (rows < -self.limit)]
        return -lost.min() if lost.numel() else high.clamp(min=0)


class LargestScore(Largest):
    """Largest magnitude of the scores that an attention has before its mask and softmax.

    They are computed where the longest query times the longest key could reach `limit`; elsewhere nothing is kept.
    """

    def __init__(self, scale: float, limit: float) -> None:
        super().__init__()
        self.scale, self.limit = scale, limit

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        q, k = args[0].detach().float(), args[1].detach().float()
        if not q.numel() or not k.numel():
            return
        k = repeat_kv(k, q.shape[1]) if q.ndim == 4 else k
        bound = q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1) * self.scale
        if bool(bound.max() < self.limit):
            return
        self.reached = True
        for index in (bound >= self.limit).nonzero().tolist():  # a head at a time: all scores at once take memory
            scores = q[tuple(index)] @ k[tuple(index)].transpose(-1, -2) * self.scale
            self.add(self.magnitude(scores))


class FullyMasked(Statistic):
    """Whether the mask of an attention hid every key from some query.

    Attributes:
        found: whether it did.
    """

    def __init__(self) -> None:
        self.found = False

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        self.found = self.found or (result.numel() > 0 and bool(fully_masked(result).any()))
