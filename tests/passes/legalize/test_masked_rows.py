"""Queries that may see no key: zeros, as torch's attention gives under a boolean mask; all others as they were."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.base import run_pipeline
from passes.fold.masks import FoldMasks
from passes.graph import aten, calls
from passes.legalize.masked_rows import ZeroMaskedRows
from passes.sdpa import HIDDEN, SDPA, fully_masked
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, rewrites, run

Q, KV = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
SEEN = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
SEEN[..., 0] = True
HOLES = SEEN.clone()
HOLES[0, 0, 3] = HOLES[1, 0, 0] = False
MIN = torch.finfo(torch.float32).min


def attention(mask: Tensor, times: int = 1) -> GraphModule:
    """`times` attentions, grouped, under one mask that is an input."""
    gm, emit, (q, kv, m) = blank(Q, KV, mask)
    return returns(gm, *(emit(SDPA, q, kv, kv, m, enable_gqa=True) for _ in range(times)))


def zeroed(gm: GraphModule) -> ZeroMaskedRows:
    return ZeroMaskedRows(list(calls(gm.graph, SDPA)))


@pytest.mark.parametrize("mask", [HOLES, HOLES[:1], HOLES[0, 0], HOLES[0, 0, 3:4]], ids=lambda m: str(tuple(m.shape)))
def test_boolean_masks_keep_what_torch_gives(mask: Tensor) -> None:
    gm = attention(mask)
    log = rewrites(partial(zeroed, gm), gm, Q, KV, mask)  # type: ignore[arg-type]
    assert (count(gm, aten.any.dim), count(gm, aten.masked_fill.Scalar)) == (1, 1)
    (notice,) = log.notices
    assert "zeros" in notice and "a kernel behind each attention" in notice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hides", [-torch.inf, MIN, -1e9, HIDDEN])
def test_an_additive_mask_means_the_same(hides: float, dtype: torch.dtype) -> None:
    bias = torch.randn(2, 1, 5, 6)
    mask = torch.where(HOLES, bias, max(hides, float(torch.finfo(dtype).min)) if hides > -torch.inf else hides)
    q, kv, mask = Q.to(dtype), KV.to(dtype), mask.to(dtype)
    gm, emit, nodes = blank(q, kv, mask)
    returns(gm, emit(SDPA, nodes[0], nodes[1], nodes[1], nodes[2], enable_gqa=True))
    (before,) = run(gm, q, kv, mask)
    assert zeroed(gm)(gm).modified
    (after,) = run(gm, q, kv, mask)
    rows = ~HOLES.any(-1, keepdim=True).expand(2, 4, 5, 8)
    assert torch.equal(after[~rows], before[~rows]) and not after[rows].any() and rows.any()
    assert not zeroed(gm)(gm).modified


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([-torch.inf, MIN, -3e4]))
def test_random_masks(seed: int, density: float, hides: float) -> None:
    """Against torch's boolean masks, whose rows without a key are zeros."""
    random = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 4, 5, 6, generator=random) < density
    expected = scaled_dot_product_attention(Q, KV, KV, keep, enable_gqa=True)
    assert not expected[~keep.any(-1)].any()
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, hides)):
        assert torch.equal(fully_masked(mask), ~keep.any(-1, keepdim=True))
        gm = attention(mask)
        zeroed(gm)(gm)
        (found,) = run(gm, Q, KV, mask)
        torch.testing.assert_close(found, expected)


def test_what_calibration_did_not_see_stays() -> None:
    assert declines(ZeroMaskedRows, attention(HOLES)) == []
    gm, emit, (q, kv) = blank(Q, KV)
    returns(gm, emit(SDPA, q, kv, kv, is_causal=True, enable_gqa=True))
    assert declines(partial(zeroed, gm), gm) == []  # type: ignore[arg-type]  # causal masks show each query a key


def test_attentions_share_the_reduction_and_others_keep_the_mask() -> None:
    gm, emit, (q, kv, m, other) = blank(Q, KV, HOLES, HOLES[:1])
    first = emit(SDPA, q, kv, kv, m, enable_gqa=True)
    second = emit(SDPA, first, kv, kv, m, enable_gqa=True)
    third = emit(SDPA, q, kv, kv, other, enable_gqa=True)
    returns(gm, first, second, emit(aten.add.Tensor, second, first), third, emit(aten.logical_not.default, m))
    make = partial(ZeroMaskedRows, [first, second])
    rewrites(make, gm, Q, KV, HOLES, HOLES[:1], fired=2)
    assert (count(gm, aten.any.dim), count(gm, aten.masked_fill.Scalar)) == (1, 2)
    assert not any(user.target is aten.masked_fill.Scalar for user in third.users)


class Constant(nn.Module):
    """A window of keys before each query, which is a function of sizes, or a stored mask."""

    def __init__(self, mask: Tensor | None = None, first: int = 0) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[-2])
        ago = steps[:, None] - steps
        window = (ago >= self.first) & (ago < 3)
        return scaled_dot_product_attention(x, x, x, window if self.mask is None else self.mask)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_mask_of_sizes_needs_no_data(dynamic: bool) -> None:
    shapes: Any = ({2: DYNAMIC},) if dynamic else None
    gm = graph_of(Constant(first=1), Q, dynamic_shapes=shapes)
    rewrites(ZeroMaskedRows, gm, torch.randn(2, 4, 7, 8) if dynamic else Q)
    assert declines(ZeroMaskedRows, graph_of(Constant(first=0), Q, dynamic_shapes=shapes)) == []


@pytest.mark.parametrize("additive", [False, True])
def test_a_stored_mask_needs_no_data_and_its_rows_are_stored(additive: bool) -> None:
    mask = HOLES[:1, :, :, :5]
    gm = graph_of(Constant(torch.zeros(mask.shape).masked_fill(~mask, MIN) if additive else mask), Q)
    run_pipeline((ZeroMaskedRows, FoldMasks), gm)
    assert count(gm, aten.any.dim) == 0
    assert only_call(gm, aten.masked_fill.Scalar).args[1].op == "get_attr"  # type: ignore[union-attr]
    (found,) = run(gm, Q)
    torch.testing.assert_close(found, scaled_dot_product_attention(Q, Q, Q, mask))
    assert not ZeroMaskedRows()(gm).modified  # as torch.compile does with a program
    seen = HOLES[:1, :, :, :5] | torch.eye(5, dtype=torch.bool)
    assert declines(ZeroMaskedRows, graph_of(Constant(seen), Q)) == []


def test_what_the_model_fills_behind_an_attention_is_something_else() -> None:
    gm, emit, (q, kv, m, rows) = blank(Q, KV, HOLES, torch.zeros(2, 1, 5, 1, dtype=torch.bool))
    returns(gm, emit(aten.masked_fill.Scalar, emit(SDPA, q, kv, kv, m, enable_gqa=True), rows, 0.0))
    assert zeroed(gm)(gm).modified
    assert count(gm, aten.masked_fill.Scalar) == 2


def test_nan_in_a_mask_is_not_taken_for_hidden_and_no_key_at_all_gives_zeros() -> None:
    mask = torch.full((5, 6), torch.nan)
    gm = attention(mask)
    zeroed(gm)(gm)
    assert run(gm, Q, KV, mask)[0].isnan().all()
    none, empty = torch.zeros(5, 0), KV[:, :, :0]
    gm, emit, (q, kv, m) = blank(Q, empty, none)
    returns(gm, emit(SDPA, q, kv, kv, m, enable_gqa=True))
    zeroed(gm)(gm)
    assert not run(gm, Q, empty, none)[0].any()
