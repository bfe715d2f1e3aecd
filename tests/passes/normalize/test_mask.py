from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.graph import aten
from passes.normalize import size_functions
from passes.normalize.mask import NormalizeAttentionMask
from passes.normalize.noops import RemoveNoOps
from passes.normalize.views import ViewsToReshape
from passes.sdpa import SDPA, Attention
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # another kernel runs when the mask goes
MIN = torch.finfo(torch.float32).min
PATTERN = "the mask stays a tensor: of sizes only, and neither all true nor causal (a sliding window, say)"
Mask = Callable[[Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """Attention of q with itself under a mask made from q and a padding mask `[B, S]`."""

    def __init__(self, mask: Mask, window: int = 64) -> None:
        super().__init__()
        self.mask = mask
        self.register_buffer("tril", torch.ones(window, window, dtype=torch.bool).tril()[None, None])
        self.bias = nn.Parameter(torch.zeros(1, 1, 9, 9))

    def forward(self, q: Tensor, padding: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=self.mask(q, padding))


def inputs(batch: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    padding = torch.ones(batch, length, dtype=torch.long)
    padding[-1, length - length // 3 :] = 0
    return torch.randn(batch, 2, length, 8), padding


def prepared(mask: Mask | nn.Module, *args: Tensor, dynamic: bool = False, **limits: Any) -> GraphModule:
    module = mask if isinstance(mask, nn.Module) else Masked(mask)
    shapes = None
    if dynamic:
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", **limits)
        shapes = ({0: batch, 2: length}, {0: batch, 1: length})
    gm = graph_of(module, *(args or inputs()), dynamic_shapes=shapes)
    ViewsToReshape()(gm)
    RemoveNoOps()(gm)
    return gm


def attention(gm: GraphModule) -> Attention:
    return Attention.of(only_call(gm, SDPA))


def length_of(q: Tensor) -> int:
    return q.shape[2]


def arange_causal(q: Tensor, padding: Tensor) -> Tensor:
    at = torch.arange(length_of(q))
    return (at[None, :] <= at[:, None])[None, None].expand(q.shape[0], -1, -1, -1)


def additive_causal(q: Tensor, padding: Tensor) -> Tensor:
    return torch.full((length_of(q), length_of(q)), float("-inf")).triu(1)


def where_causal(q: Tensor, padding: Tensor) -> Tensor:
    return torch.where(arange_causal(q, padding), torch.tensor(0.0), MIN)


def all_true(q: Tensor, padding: Tensor) -> Tensor:
    return (torch.arange(length_of(q)) >= 0)[None, None, :, None].expand(q.shape[0], 1, -1, length_of(q))


def all_zero(q: Tensor, padding: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], 1, length_of(q), length_of(q))


def window(q: Tensor, padding: Tensor) -> Tensor:
    at = torch.arange(length_of(q))
    return (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 20)


def lookup(q: Tensor, padding: Tensor) -> Tensor:
    """As Hugging Face writes padding."""
    rows = torch.arange(q.shape[0])[:, None, None, None]
    columns = torch.arange(length_of(q))[None, None, None, :]
    return padding.bool()[rows, columns]


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [all_true, all_zero])
def test_removes_a_mask_that_hides_nothing(mask: Mask, dynamic: bool) -> None:
    gm = prepared(mask, dynamic=dynamic)
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    assert attention(gm).mask is None and not attention(gm).is_causal
    FileCheck().check_not("arange").check_not("zeros").run(gm.code)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [arange_causal, additive_causal, where_causal])
def test_recognises_a_causal_mask(mask: Mask, dynamic: bool) -> None:
    gm = prepared(mask, dynamic=dynamic)
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    assert attention(gm).mask is None and attention(gm).is_causal
    assert len([n for n in gm.graph.nodes if n.op == "call_function"]) == 3
    if dynamic:
        q, padding = inputs(3, 21)
        expected = F.scaled_dot_product_attention(q, q + 1, q - 1, is_causal=True)
        torch.testing.assert_close(run(gm, q, padding)[0], expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_recognises_a_causal_buffer(dynamic: bool) -> None:
    class Buffered(Masked):
        def forward(self, q: Tensor, padding: Tensor) -> Tensor:
            mask = self.tril[:, :, : q.shape[2], : q.shape[2]]
            return F.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=mask)

    gm = prepared(Buffered(all_true), dynamic=dynamic, **({"max": 63} if dynamic else {}))
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    assert attention(gm).is_causal


def test_a_window_in_a_buffer_is_found_at_the_end_of_the_range() -> None:
    class Buffered(Masked):
        def forward(self, q: Tensor, padding: Tensor) -> Tensor:
            mask = self.tril[:, :, : q.shape[2], : q.shape[2]]
            return F.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=mask)

    module = Buffered(all_true, window=256)
    module.tril = module.tril & torch.ones(256, 256, dtype=torch.bool).triu(-100)
    gm = prepared(module, dynamic=True, max=255)
    assert declines(NormalizeAttentionMask, gm) == [PATTERN]


@pytest.mark.parametrize("length", [9, 21])
def test_a_window_is_causal_only_while_it_is_not_shorter(length: int) -> None:
    gm = prepared(window, *inputs(2, length))
    if length <= 20:
        rewrites(NormalizeAttentionMask, gm, *inputs(2, length), **CLOSE)
        assert attention(gm).is_causal
    else:
        assert declines(NormalizeAttentionMask, gm) == [PATTERN]


@pytest.mark.everyday(2)
@pytest.mark.parametrize("size", [2, 19, 100, 1000])
def test_declines_a_window_of_any_size_if_lengths_are_dynamic(size: int) -> None:
    def sliding(q: Tensor, padding: Tensor) -> Tensor:
        at = torch.arange(length_of(q))
        return (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < size)

    assert declines(NormalizeAttentionMask, prepared(sliding, dynamic=True)) == [PATTERN]


def test_declines_a_window_whose_size_stands_in_the_first_branch() -> None:
    def sliding(q: Tensor, padding: Tensor) -> Tensor:
        at = torch.arange(length_of(q))
        return (at[:, None] - at[None, :] < 100) & (at[None, :] <= at[:, None])

    assert declines(NormalizeAttentionMask, prepared(sliding, dynamic=True)) == [PATTERN]


def test_declines_a_window_whose_size_is_a_constant_tensor() -> None:
    class Sized(Masked):
        def forward(self, q: Tensor, padding: Tensor) -> Tensor:
            at = torch.arange(q.shape[2])
            mask = (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < self.size)
            return F.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=mask)

    module = Sized(all_true)
    module.register_buffer("size", torch.tensor(100))
    assert declines(NormalizeAttentionMask, prepared(module, dynamic=True)) == [PATTERN]


def test_declines_what_is_too_large_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_functions, "MAX_BYTES", 64)
    (reason,) = declines(NormalizeAttentionMask, prepared(additive_causal))
    assert reason.startswith("cannot tell what the mask is") and "too large to compute" in reason


def test_declines_a_causal_mask_of_fewer_keys() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[:, : k.shape[2]]
            return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    args = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 4, 8)
    assert declines(NormalizeAttentionMask, prepared(Cross(), *args)) == [PATTERN]


def test_declines_a_constant_bias_but_not_for_being_zero_in_training() -> None:
    class Biased(Masked):
        def forward(self, q: Tensor, padding: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=self.bias)

    assert declines(NormalizeAttentionMask, prepared(Biased(all_true))) == []  # a parameter

    def slopes(q: Tensor, padding: Tensor) -> Tensor:
        return torch.arange(length_of(q)).float()[None, None, None] * 0.5

    reasons = declines(NormalizeAttentionMask, prepared(slopes))
    assert reasons == ["the mask stays a tensor: it is an additive bias that does not depend on the input"]


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("dynamic", "batch"), [(False, 2), (False, 1), (True, 2)])
def test_padding_lookup_becomes_unsqueeze(dynamic: bool, batch: int) -> None:
    def padded(q: Tensor, padding: Tensor) -> Tensor:
        mask = all_true(q, padding) & lookup(q, padding)
        return mask.expand(-1, -1, length_of(q), -1)

    gm = prepared(padded, *inputs(batch), dynamic=dynamic)
    rewrites(NormalizeAttentionMask, gm, *inputs(batch), **CLOSE)
    FileCheck().check_not("arange").check_not("index").check_not("expand").check("unsqueeze").run(gm.code)
    mask = attention(gm).mask
    assert mask is not None and [str(s) for s in mask.meta["val"].shape[1:3]] == ["1", "1"]


def test_padding_lookup_of_unrelated_batches_stays_a_selection() -> None:
    shapes = ({0: DYNAMIC, 2: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC})
    gm = graph_of(Masked(lookup), *inputs(), dynamic_shapes=shapes)
    ViewsToReshape()(gm)
    RemoveNoOps()(gm)
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    assert count(gm, aten.index.Tensor) == 0 and count(gm, aten.index_select.default) >= 1


@pytest.mark.parametrize("reverse", [lambda n: torch.arange(n - 1, -1, -1), lambda n: torch.arange(n) // 2])
def test_a_lookup_that_is_no_range_stays(reverse: Callable[[int], Tensor]) -> None:
    def shuffled(q: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[0])[:, None, None, None]
        return padding.bool()[rows, reverse(length_of(q))[None, None, None, :]]

    assert declines(NormalizeAttentionMask, prepared(shuffled)) == []


@pytest.mark.everyday(1)
@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_with_padding_keeps_both(dynamic: bool) -> None:
    def both(q: Tensor, padding: Tensor) -> Tensor:
        return arange_causal(q, padding) & all_true(q, padding) & lookup(q, padding)

    gm = prepared(both, dynamic=dynamic)
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    assert not attention(gm).is_causal
    assert count(gm, aten.__and__.Tensor, aten.bitwise_and.Tensor) == 1 and count(gm, aten.index.Tensor) == 0


ADDITIVE: dict[str, Mask] = {
    "where": lambda q, p: torch.where(p.bool()[:, None, None, :], 0.0, MIN),
    "where_hidden": lambda q, p: torch.where(p[:, None, None, :] == 0, MIN, 0.0),
    "masked_fill": lambda q, p: torch.zeros(1).masked_fill(p[:, None, None, :] == 0, -1e9),
    "masked_fill_twice": lambda q, p: (
        torch.zeros(9, 9).masked_fill(p[:, None, None, :] == 0, -1e9).masked_fill(q[:, :1, :, :1] > 9, -1e9)
    ),
    "sum": lambda q, p: where_causal(q, p) + torch.where(p.bool()[:, None, None, :], 0.0, MIN / 2),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_masks_that_hide_become_boolean(name: str) -> None:
    gm = prepared(ADDITIVE[name])
    rewrites(NormalizeAttentionMask, gm, *inputs(), **CLOSE)
    mask = attention(gm).mask
    assert mask is not None and mask.meta["val"].dtype is torch.bool


@pytest.mark.parametrize("value", [-100.0, -9999.0])
def test_additive_masks_that_do_not_quite_hide_stay(value: float) -> None:
    gm = prepared(lambda q, p: torch.where(p.bool()[:, None, None, :], 0.0, value))
    assert declines(NormalizeAttentionMask, gm) == []


def test_attentions_share_what_is_found_and_other_users_keep_the_mask() -> None:
    class Two(Masked):
        def forward(self, q: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
            mask = (arange_causal(q, padding) & lookup(q, padding)).expand(-1, 2, -1, -1)
            for _ in range(2):
                q = F.scaled_dot_product_attention(q, q + 1, q - 1, attn_mask=mask)
            return q, mask.sum()

    gm = prepared(Two(all_true))
    rewrites(NormalizeAttentionMask, gm, *inputs(), fired=2, **CLOSE)
    masks = {Attention.of(n).mask for n in gm.graph.nodes if n.target is SDPA}
    assert len(masks) == 1
    assert count(gm, aten.expand.default, aten.sum.default) >= 2


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(-3, 12))
def test_any_band(batch: int, length: int, width: int) -> None:
    """A band mask is causal, trivial or kept, and never changes a value; computed by torch as the judge."""

    def band(q: Tensor, padding: Tensor) -> Tensor:
        return torch.ones(length_of(q), length_of(q), dtype=torch.bool).tril(width)

    args = inputs(batch, length)
    gm = graph_of(Masked(band), *args)
    want = band(*args)
    expected = run(gm, *args)
    NormalizeAttentionMask()(gm)
    found = attention(gm)
    assert (found.mask is None) == (bool(want.all()) or torch.equal(want, torch.ones_like(want).tril()))
    torch.testing.assert_close(run(gm, *args), expected, equal_nan=True, **CLOSE)
