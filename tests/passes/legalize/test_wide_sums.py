"""Sums by index in float32."""

from __future__ import annotations

import pytest
import torch

from passes.graph import aten
from passes.legalize.wide_sums import WideIndexedSums
from passes.testing import blank, declines, returns, rewrites

X, INDEX = torch.randn(4, 3), torch.tensor([1, 1, 1, 3])
ROWS = torch.randn(4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    x, rows = X.to(dtype), ROWS.to(dtype)
    gm, emit, (a, b, index) = blank(x, rows, INDEX)
    returns(gm, emit(aten.index_add.default, a, 0, index, b))
    rewrites(WideIndexedSums, gm, x, rows, INDEX, rtol=2e-2, atol=2e-2)
    assert torch.equal(gm(x, rows, INDEX)[0], x.float().index_add(0, INDEX, rows.float()).to(dtype))


@pytest.mark.parametrize("accumulate", [True, False])
def test_index_put(accumulate: bool) -> None:
    x, rows = X.half(), ROWS.half()
    gm, emit, (a, b, index) = blank(x, rows, INDEX)
    returns(gm, emit(aten.index_put.default, a, [index], b, accumulate))
    if accumulate:
        rewrites(WideIndexedSums, gm, x, rows, INDEX, rtol=2e-3, atol=2e-3)
    else:
        assert declines(WideIndexedSums, gm) == []


def test_float32_stays() -> None:
    gm, emit, (a, b, index) = blank(X, ROWS, INDEX)
    returns(gm, emit(aten.index_add.default, a, 0, index, b))
    assert declines(WideIndexedSums, gm) == []
