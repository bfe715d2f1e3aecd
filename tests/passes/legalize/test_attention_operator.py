"""Which attentions over a cache TensorRT's own operator reads as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.fuse.caches import StoreCaches
from passes.graph import aten, calls
from passes.ir import ATTENTION, QUANTIZE
from passes.legalize.attention import DecomposeAttention
from passes.legalize.attention_operator import has_operator
from passes.legalize.cached_codes import AppendInFloat
from passes.testing import DYNAMIC, count, graph_of
from tests.passes.support import insert

S = torch.tensor(0.0625)
CACHE = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), S)


class Decoder(nn.Module):
    """One attention of four heads over a cache of two; `before` is a causal one over the queries alone."""

    def __init__(
        self, *, masked: bool = True, returned: bool = True, value_width: int = 8, before: bool = False
    ) -> None:
        super().__init__()
        self.masked, self.returned, self.value_width, self.before = masked, returned, value_width, before

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> Any:
        if self.before:
            q = scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0)
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = scaled_dot_product_attention(q, keys, values, mask if self.masked else None, scale=1.0, enable_gqa=True)
        return (out, keys, values) if self.returned else out


def lowered(scales: Any = CACHE, *, dynamic: bool = False, **options: Any) -> GraphModule:
    """The graph as it comes to `DecomposeAttention`; `dynamic`: new tokens and past are."""
    new, past, wide = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), options.get("value_width", 8)
    inputs = torch.randn(1, 4, 3, 8), new, new[..., :wide].clone(), past, past[..., :wide].clone(), torch.randn(3, 8)
    axes = {2: DYNAMIC}
    shapes = {**dict.fromkeys(("q", "k", "v", "past_k", "past_v"), axes), "mask": {0: DYNAMIC, 1: DYNAMIC}}
    gm = graph_of(Decoder(**options), *inputs, dynamic_shapes=shapes if dynamic else None)
    insert(gm, scales)
    for step in (FuseAttentionQdq, StoreCaches, AppendInFloat):
        step()(gm)
    return gm


def test_codes_of_a_cache_are_read_as_they_are() -> None:
    gm = lowered(dynamic=True)
    (node,) = calls(gm.graph, ATTENTION)
    assert has_operator(node)
    assert not DecomposeAttention(unless=has_operator)(gm).modified
    # keys and values are quantized once, for the output and the attention alike; products need them a second time
    assert count(gm, QUANTIZE) == 3
    DecomposeAttention()(gm)
    assert count(gm, QUANTIZE) == 6 and count(gm, aten.expand.default) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"masked": False},
        {"returned": False},
        {"value_width": 4},
        {"scales": dict.fromkeys("qkv", S), "returned": False},
    ],
    ids=["no mask", "not given back", "narrow values", "no cache"],
)
def test_others_are_products(options: dict[str, Any]) -> None:
    gm = lowered(**options)
    assert [has_operator(node) for node in calls(gm.graph, ATTENTION)] == [False]


def test_a_file_has_one_body_of_the_operator() -> None:
    gm = lowered(before=True, dynamic=True)  # of any length, so it may be a long one
    assert [has_operator(node) for node in calls(gm.graph, ATTENTION)] == [True, False]
