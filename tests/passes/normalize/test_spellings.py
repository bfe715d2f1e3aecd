"""Operators that exporters do not know, written with those that they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten
from passes.normalize.spellings import PlainSpellings
from passes.testing import blank, count, declines, graph_of, returns, rewrites

X = torch.randn(3, 4)


class Selected(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.masked_select(x, x > 0), torch.masked_select(x, (x > 0).all(-1, keepdim=True)) + 1


def test_masked_select_is_indexing() -> None:
    gm = graph_of(Selected(), X)
    rewrites(PlainSpellings, gm, X, fired=2)
    assert count(gm, aten.index.Tensor) == 2


@pytest.mark.parametrize("target", [aten._is_all_true.default, aten._is_any_true.default])
def test_checks(target: torch._ops.OpOverload) -> None:
    mask = X > 0
    gm, emit, (x,) = blank(mask)
    rewrites(PlainSpellings, returns(gm, emit(target, x)), mask)


@pytest.mark.parametrize("target", [aten.amax.default, aten.amin.default])
def test_all_axes_have_numbers(target: torch._ops.OpOverload) -> None:
    gm, emit, (x,) = blank(X)
    returns(gm, emit(target, x), emit(target, x, [], True))
    rewrites(PlainSpellings, gm, X, fired=2)


def test_an_axis_that_is_named_stays() -> None:
    gm, emit, (x,) = blank(X)
    assert declines(PlainSpellings, returns(gm, emit(aten.amax.default, x, [1]))) == []
