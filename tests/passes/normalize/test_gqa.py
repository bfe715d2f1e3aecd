from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import FileCheck

from passes.graph import aten
from passes.normalize.gqa import UnexpandGroupedQuery
from passes.normalize.noops import RemoveNoOps
from passes.normalize.views import ViewsToReshape
from passes.sdpa import SDPA, Attention
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # another kernel may run


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    expanded = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return expanded.reshape(batch, heads * times, length, width)


def repeat_interleave(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1)


class Grouped(nn.Module):
    def __init__(self, repeat: object = repeat_kv, key_times: int = 2, value_times: int = 2) -> None:
        super().__init__()
        self.repeat, self.key_times, self.value_times = repeat, key_times, value_times

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k + 1, v + 1
        k = self.repeat(k, self.key_times) if self.key_times > 1 else k  # type: ignore[operator]
        v = self.repeat(v, self.value_times) if self.value_times > 1 else v  # type: ignore[operator]
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def inputs(batch: int = 2, heads: int = 4, kv_heads: int = 2, v_heads: int | None = None) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, heads, 5, 8),
        torch.randn(batch, kv_heads, 5, 8),
        torch.randn(batch, v_heads or kv_heads, 5, 8),
    )


def prepare(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    ViewsToReshape()(gm)
    RemoveNoOps()(gm)
    return gm


def repeat_interleave_from_the_end(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=-3)


@pytest.mark.parametrize("repeat", [repeat_kv, repeat_interleave, repeat_interleave_from_the_end])
def test_fires(repeat: object) -> None:
    args = inputs()
    gm = prepare(graph_of(Grouped(repeat), *args))
    rewrites(UnexpandGroupedQuery, gm, *args, **CLOSE)
    FileCheck().check_not("expand").check_not("repeat_interleave").check("enable_gqa = True").run(gm.code)
    attention = Attention.of(only_call(gm, SDPA))
    assert [n.meta["val"].shape[1] for n in (attention.q, attention.k, attention.v)] == [4, 2, 2]


@pytest.mark.slow
@settings(max_examples=8)  # each is an export
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4))
def test_any_number_of_heads(batch: int, kv_heads: int, times: int) -> None:
    args = inputs(batch, kv_heads * times, kv_heads)
    gm = prepare(graph_of(Grouped(repeat_kv, times, times), *args))
    rewrites(UnexpandGroupedQuery, gm, *args, **CLOSE)


def test_declines_if_one_is_repeated() -> None:
    gm = prepare(graph_of(Grouped(value_times=1), *inputs(v_heads=4)))
    assert declines(UnexpandGroupedQuery, gm) == ["only one of key and value has repeated heads"]


def test_declines_if_repeated_differently() -> None:
    gm = prepare(graph_of(Grouped(value_times=4), *inputs(v_heads=1)))
    assert declines(UnexpandGroupedQuery, gm) == ["key has 2 heads before they are repeated and value 1"]


def test_leaves_attention_of_equal_heads() -> None:
    gm = prepare(graph_of(Grouped(key_times=1, value_times=1), *inputs(kv_heads=4)))
    assert declines(UnexpandGroupedQuery, gm) == []


def test_repetition_of_whole_groups_is_another_order() -> None:
    def tile(x: Tensor, times: int) -> Tensor:
        batch, heads, length, width = x.shape
        return x[:, None].expand(batch, times, heads, length, width).reshape(batch, heads * times, length, width)

    gm = prepare(graph_of(Grouped(tile), *inputs()))
    assert declines(UnexpandGroupedQuery, gm) == []


def test_copies_that_differ_are_no_repetition() -> None:
    def weighted(x: Tensor, times: int) -> Tensor:
        batch, heads, length, width = x.shape
        return (x[:, :, None] * torch.rand(times, 1, 1)).reshape(batch, heads * times, length, width)

    gm = prepare(graph_of(Grouped(weighted), *inputs()))
    assert declines(UnexpandGroupedQuery, gm) == []


def test_second_user_keeps_the_copy() -> None:
    class Cached(Grouped):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            k, v = repeat_kv(k + 1, 2), repeat_kv(v + 1, 2)
            return F.scaled_dot_product_attention(q, k, v), k.neg()

    args = inputs()
    gm = prepare(graph_of(Cached(), *args))
    rewrites(UnexpandGroupedQuery, gm, *args, **CLOSE)
    assert count(gm, aten.expand.default) == 1


@pytest.mark.slow
def test_dynamic_shapes() -> None:
    args = inputs()
    dynamic = ({0: DYNAMIC, 2: DYNAMIC},) * 3
    gm = prepare(graph_of(Grouped(), *args, dynamic_shapes=dynamic))
    rewrites(UnexpandGroupedQuery, gm, *args, **CLOSE)
