"""Quantized attention as matrix products and a softmax, with the same codes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import FileCheck

from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten
from passes.ir import ATTENTION, QUANTIZE
from passes.legalize.attention import DecomposeAttention
from passes.legalize.attention_operator import is_long_causal
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Attention, insert

S = torch.tensor(0.02)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def fused(module: nn.Module, *inputs: Any, **options: Any) -> GraphModule:
    gm = graph_of(module, *inputs, **options)
    insert(gm, {"q": S, "k": S, "v": S})
    assert FuseAttentionQdq()(gm).modified
    return gm


@pytest.mark.everyday(4)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_values_are_the_same(causal: bool, kv_heads: int, dynamic: bool) -> None:
    shapes = {"x": {0: DYNAMIC, 1: DYNAMIC}, "mask": None} if dynamic else None
    module = Attention(4, 8, kv_heads, scale=1.0, is_causal=causal)
    gm = fused(module, torch.randn(2, 5, 32), None, dynamic_shapes=shapes)
    rewrites(DecomposeAttention, gm, torch.randn(3 if dynamic else 2, 7 if dynamic else 5, 32), None, **TOLERANCE)
    assert (count(gm, ATTENTION), count(gm, aten.matmul.default), count(gm, aten.softmax.int)) == (0, 2, 1)
    assert count(gm, QUANTIZE) == 4
    assert count(gm, aten.where.self) == causal
    # K is transposed, and grouped heads repeated, in front of the quantizer
    FileCheck().check("quantize.default(transpose").check("aten.softmax").check("quantize.default(softmax").run(gm.code)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_added(kind: str) -> None:
    x, keep = torch.randn(2, 5, 16), torch.rand(1, 1, 5, 5) < 0.5
    keep[..., 0] = True
    mask = keep if kind == "bool" else torch.randn(1, 1, 5, 5)
    rewrites(DecomposeAttention, fused(Attention(scale=1.0), x, mask), x, mask, **TOLERANCE)


# Small enough that every product and sum is exact in float32, in whatever order it is added.
halves = hnp.arrays(np.float32, (1, 6, 16), elements=st.sampled_from([-0.5, 0.0, 0.5]))


@pytest.mark.parametrize("causal", [False, True])
def test_every_bit_is_that_of_the_operator(causal: bool) -> None:
    gm = graph_of(Attention(4, 4, 2, scale=1.0, is_causal=causal), torch.randn(1, 6, 16), None)
    insert(gm, dict.fromkeys("qkv", torch.tensor(0.5)))
    sites = [site.consumer for site in find_sites(gm) if site.operand == "softmax"]
    FuseAttentionQdq(dict.fromkeys(sites, torch.tensor(2.0**-9)))(gm)
    written = copy.deepcopy(gm)
    assert DecomposeAttention()(written).modified and count(gm, ATTENTION) == 1 and count(written, ATTENTION) == 0

    @settings(max_examples=30)
    @given(halves)
    def compare(x: np.ndarray) -> None:
        (expected,), (found,) = (run(graph, torch.from_numpy(x), None) for graph in (gm, written))
        assert torch.equal(found, expected)

    compare()


class TwoAttentions(nn.Module):
    """Two causal attentions share k, which is returned as well."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        y = scaled_dot_product_attention(q, k, k, scale=1.0, is_causal=True)
        return scaled_dot_product_attention(y, k, k, scale=1.0, is_causal=True), k, k.sin()


def test_one_causal_mask_for_a_size_and_other_users_keep_their_values() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    gm = fused(TwoAttentions(), q, k)
    before = run(gm, q, k)
    rewrites(DecomposeAttention, gm, q, k, fired=2, **TOLERANCE)
    assert count(gm, aten.where.self) == 1
    after = run(gm, q, k)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, k, scale=1.0, is_causal=True)


def test_no_score_of_a_hidden_key_is_infinite_in_float16() -> None:
    """The lowest float16 and a score of -512 are -inf, which not every softmax takes."""
    q = torch.full((1, 1, 3, 8), 8.0, dtype=torch.float16)
    gm = fused(Causal(), q, -q)
    DecomposeAttention()(gm)
    output = gm.graph.output_node()
    output.args = ((only_call(gm, aten.softmax.int).args[0],),)
    (scores,) = run(gm, q, -q)
    assert scores.dtype is torch.float16 and scores.isfinite().all()
    assert torch.equal(scores < -3e4, torch.ones(1, 1, 3, 3, dtype=torch.bool).triu(1))


@pytest.mark.parametrize(
    ("causal", "keys", "dynamic", "stays"),
    [(True, 513, False, True), (True, 512, False, False), (True, 3, True, True), (False, 513, False, False)],
)
def test_what_the_back_end_has_a_better_operator_for_stays(causal: bool, keys: int, dynamic: bool, stays: bool) -> None:
    """A length that inputs decide can be long, unless it has a bound."""
    x = torch.randn(1, keys, 16)
    options = {"dynamic_shapes": {"x": {1: DYNAMIC}, "mask": None}} if dynamic else {}
    gm = fused(Attention(scale=1.0, is_causal=causal), x, None, **options)
    assert is_long_causal(only_call(gm, ATTENTION)) is stays
    make = lambda: DecomposeAttention(unless=is_long_causal)  # noqa: E731
    if stays:
        assert declines(make, gm) == []
    else:
        rewrites(make, gm, x, None, **TOLERANCE)


def test_a_bounded_length_is_as_short_as_its_bound() -> None:
    shapes = {"x": {1: torch.export.Dim("tokens", max=512)}, "mask": None}
    gm = fused(Attention(scale=1.0, is_causal=True), torch.randn(1, 3, 16), None, dynamic_shapes=shapes)
    assert not is_long_causal(only_call(gm, ATTENTION))
