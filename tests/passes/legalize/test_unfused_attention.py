"""Attention that no kernel of TensorRT takes goes back to floating point, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.base import PassLog
from passes.formats import FP8, INT8, Format
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import argument
from passes.ir import ATTENTION, QUANTIZE
from passes.legalize.attention import quantize_of
from passes.legalize.unfused_attention import LeaveUnfusedAttention
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, graph_of, only_call, rewrites, run
from tests.passes.support import insert

S = torch.tensor(0.02)


class Heads(nn.Module):
    """Attention of `kv_heads` key heads, whose output goes through a view to a linear layer or to `relu`."""

    def __init__(self, width: int, *, linear: bool = True, causal: bool = False, kv_heads: int = 2) -> None:
        super().__init__()
        self.causal, self.kv_heads = causal, kv_heads
        self.out = nn.Linear(2 * width, 4) if linear else None

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = k[:, : self.kv_heads]
        grouped = self.kv_heads != q.shape[1]
        y = scaled_dot_product_attention(q, v, v.sin(), mask, 0.0, self.causal, scale=1.0, enable_gqa=grouped)
        y = y.transpose(1, 2).flatten(2)
        return self.out(y) if self.out is not None else y.relu(), v.cos()


def fused(
    module: nn.Module, queries: int, keys: int, width: int, *, fmt: Format = FP8, mask: Tensor | None = None, **o: Any
) -> tuple[GraphModule, tuple[Any, ...]]:
    dtype = o.pop("dtype", torch.float16)
    inputs = (torch.randn(1, 2, queries, width, dtype=dtype), torch.randn(1, 2, keys, width, dtype=dtype), mask)
    gm = graph_of(module.to(dtype), *inputs, **o)
    insert(gm, {"q": S, "k": S, "v": S, "input": S, "weight": S}, fmt)
    assert FuseAttentionQdq()(gm).modified
    return gm, inputs


def left(gm: GraphModule) -> PassLog:
    make = LeaveUnfusedAttention()
    make(gm)
    return make.log


@pytest.mark.parametrize(
    ("fmt", "queries", "keys", "width", "said"),
    [
        (FP8, 64, 31, 32, "as short as 31, and fused FP8 attention needs at least 32"),
        (FP8, 64, 32, 257, "head dimension 257, and fused FP8 attention takes at most 256"),
        (FP8, 1, 64, 32, "it can have 1 query, and fused FP8 attention needs at least 2"),
        (INT8, 64, 513, 32, "as long as 513, and fused INT8 attention takes at most 512"),
        (INT8, 1, 64, 32, "it can have 1 query, and fused INT8 attention needs at least 2"),
        (INT8, 64, 64, 48, "head dimension 48, and fused INT8 attention takes 16, 32, 64"),
    ],
)
def test_what_has_no_kernel_is_computed_from_the_values_before_the_quantizers(
    fmt: Format, queries: int, keys: int, width: int, said: str
) -> None:
    gm, inputs = fused(Heads(width), queries, keys, width, fmt=fmt)
    query = quantize_of(only_call(gm, ATTENTION).args[0]).args[0]
    log = left(gm)
    assert [said in decline.reason for decline in log.declined] == [True]
    attention = only_call(gm, SDPA)
    assert attention.args[0] is query and argument(attention, "scale") == 1.0
    assert count(gm, ATTENTION) == 0 and count(gm, QUANTIZE) == 2  # of the linear layer
    assert [out.isfinite().all() for out in run(gm, *inputs)]


@pytest.mark.parametrize(
    ("fmt", "queries", "keys", "width"),
    [(FP8, 2, 32, 256), (FP8, 64, 4096, 8), (INT8, 2, 1, 16), (INT8, 64, 512, 64)],
)
def test_what_has_one_stays(fmt: Format, queries: int, keys: int, width: int) -> None:
    gm, _ = fused(Heads(width), queries, keys, width, fmt=fmt)
    log = left(gm)
    assert (log.declined, log.notices, count(gm, ATTENTION)) == ([], [], 1)


@pytest.mark.parametrize(("fmt", "dtype"), [(FP8, torch.float32), (INT8, torch.float16), (INT8, torch.float32)])
def test_the_next_reader_has_to_be_a_quantizer(fmt: Format, dtype: torch.dtype) -> None:
    assert left(fused(Heads(32), 64, 64, 32, fmt=fmt, dtype=dtype)[0]).declined == []
    (decline,) = left(fused(Heads(32, linear=False), 64, 64, 32, fmt=fmt, dtype=dtype)[0]).declined
    assert "the next reader of its output has to be a quantizer" in decline.reason
    assert left(fused(Heads(32, linear=False), 64, 64, 32, dtype=torch.float16)[0]).declined == []


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_the_numbers_are_those_of_the_attention(causal: bool, masked: bool, kv_heads: int) -> None:
    mask = torch.rand(1, 1, 5, 5) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    module = Heads(8, causal=causal, kv_heads=kv_heads)
    gm, inputs = fused(module, 5, 5, 8, mask=mask, dtype=torch.float32)
    # two steps of FP8 for q and k, values and probabilities
    rewrites(LeaveUnfusedAttention, gm, *inputs, rtol=0.1, atol=0.2)
    assert count(gm, SDPA) == 1


class Channels(nn.Module):
    """Attention among the channels of each head: packed columns are the sequence, as in DaViT and XCiT."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 32)).transpose(1, 2).transpose(-1, -2)
        return scaled_dot_product_attention(q, q.cos(), q.sin(), scale=1.0)


class Map(nn.Module):
    """Attention among the places of what a convolution makes: the sequence is innermost there, too."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.reshape(1, 2, 32, -1).transpose(-1, -2)
        return scaled_dot_product_attention(q, q.cos(), q.sin(), scale=1.0)


@pytest.mark.parametrize(("module", "declined"), [(Channels(), 1), (Map(), 0)])
def test_channels_are_declined_and_maps_are_not(module: nn.Module, declined: int) -> None:
    gm = graph_of(module, torch.randn(1, 64, 64, dtype=torch.float16))
    insert(gm, {"q": S, "k": S, "v": S})
    assert FuseAttentionQdq()(gm).modified
    assert ["attends to channels" in decline.reason for decline in left(gm).declined] == [True] * declined


@pytest.mark.parametrize(("batch", "declined"), [(1, 1), (2, 0)])
def test_one_head_of_one_sample_is_declined(batch: int, declined: int) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x.cos(), x.sin(), scale=1.0)

    gm = graph_of(One(), torch.randn(batch, 1, 64, 32, dtype=torch.float16))
    insert(gm, {"q": S, "k": S, "v": S})
    assert FuseAttentionQdq()(gm).modified
    assert ["one head of one sample" in decline.reason for decline in left(gm).declined] == [True] * declined


def test_lengths_that_inputs_decide_are_told() -> None:
    shapes = {"q": {2: DYNAMIC}, "k": {2: DYNAMIC}, "mask": None}
    gm, _ = fused(Heads(32), 64, 64, 32, dynamic_shapes=shapes)
    log = left(gm)
    assert count(gm, ATTENTION) == 1 and log.declined == []
    assert ["needs at least 32" in notice for notice in log.notices] == [True]


def test_lengths_that_are_never_long_enough_are_declined() -> None:
    few = torch.export.Dim("keys", max=31)
    gm, _ = fused(Heads(32), 64, 20, 32, dynamic_shapes={"q": None, "k": {2: few}, "mask": None})
    assert len(left(gm).declined) == 1
