"""Bits of numbers that are 0 or 1 become logic; those of other numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.base import run_pipeline
from passes.graph import aten
from passes.normalize.flags import BitsToLogic
from passes.testing import count, graph_of, rewrites

MASK = torch.randn(3, 4) > 0
NUMBERS = torch.arange(12).reshape(3, 4)
BITS = (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor)
BITS += (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor)


class Bits(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, mask: Tensor, numbers: Tensor) -> Tensor:
        return self.function(mask, numbers) + numbers


@pytest.mark.parametrize(
    "function",
    [
        lambda m, n: torch.full((3, 1), 1, dtype=torch.int32).expand(3, 4) | m,
        lambda m, n: m.int() & m[:1].long(),
        lambda m, n: torch.zeros(3, 4, dtype=torch.int64) ^ m.unsqueeze(0).to(torch.uint8),
    ],
)
def test_flags(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = graph_of(Bits(function), MASK, NUMBERS)
    rewrites(BitsToLogic, gm, MASK, NUMBERS)
    assert not count(gm, *BITS)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, n: n | m,
        lambda m, n: torch.full((3, 1), 2) & n,
        lambda m, n: (m & m.logical_not()) + (m | m),
    ],
)
def test_other_numbers_and_booleans_stay(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = graph_of(Bits(function), MASK, NUMBERS)
    before = gm.code
    log = run_pipeline([BitsToLogic], gm)
    assert not log.fired and gm.code == before
