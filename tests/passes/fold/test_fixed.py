"""What no input reaches is stored: products as numbers, operands of attention as codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.constants import constant
from passes.fold import fixed
from passes.fold.fixed import FoldFixed
from passes.fold.weights import FoldWeights
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.legalize.attention import DecomposeAttention
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import insert

S = torch.tensor(0.02)


class Positions(nn.Module):
    """A table that an MLP works on, added to the data before a linear layer (Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(4, 3))
        self.mlp = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x + self.mlp(self.grid))
        return result


class Learned(nn.Module):
    """Attention whose queries, or keys and values, are learned: [B,H,S,D], each expanded to the batch."""

    def __init__(self, *, queries: bool, project: bool) -> None:
        super().__init__()
        self.queries, self.learned = queries, nn.Parameter(torch.randn(1, 2, 3, 8))
        self.proj = nn.Linear(8, 8) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        own = self.proj(self.learned).expand(x.shape[0], -1, -1, -1)
        q, k, v = (own, x, x) if self.queries else (x, own, own)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def test_products_are_stored_and_their_weights_go() -> None:
    x = torch.randn(2, 4, 8)
    gm = graph_of(Positions(), x)
    insert(gm, {"proj.input_quantizer": S, "proj.weight_quantizer": S})
    FoldWeights()(gm)
    rewrites(FoldFixed, gm, x)
    assert count(gm, aten.linear.default) == 1 and count(gm, aten.relu.default) == 0
    assert count(gm, DEQUANTIZE) == 2, "a weight stays as codes"
    (stored,) = [n for n in gm.graph.find_nodes(op="get_attr") if "constant" in n.target]
    assert constant(gm, stored).shape == (4, 8)  # type: ignore[union-attr]
    assert not any(str(n.target).startswith("mlp.0") for n in gm.graph.find_nodes(op="get_attr"))


def fused(queries: bool, project: bool, **options: Any) -> GraphModule:
    gm = graph_of(Learned(queries=queries, project=project), torch.randn(2, 2, 5, 8), **options)
    insert(gm, {"q": S, "k": S, "v": S})
    FoldWeights()(gm)
    assert FuseAttentionQdq()(gm).modified
    return gm


@pytest.mark.everyday(2)
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_operands_of_attention_are_stored_as_codes(queries: bool, project: bool) -> None:
    x = torch.randn(2, 2, 5, 8)
    gm = fused(queries, project)
    expected = run(gm, x)
    DecomposeAttention()(gm)
    rewrites(FoldFixed, gm, x)  # keys and values are one tensor, and one pair
    torch.testing.assert_close(run(gm, x), expected)
    assert count(gm, aten.linear.default) == 0
    stored = [n for n in gm.graph.find_nodes(op="get_attr") if constant(gm, n).dtype is torch.float8_e4m3fn]  # type: ignore[union-attr]
    assert len(stored) == 1
    (pair,) = stored[0].users
    assert is_call(pair, DEQUANTIZE) and pair.args[0] is stored[0]
    if not queries:
        assert any(is_call(user, aten.transpose.int) for user in pair.users), "TensorRT fuses K so"


@pytest.mark.parametrize("queries", [False, True])
def test_what_is_expanded_to_a_dynamic_size_is_stored_before(queries: bool) -> None:
    gm = fused(queries, project=True, dynamic_shapes=({0: DYNAMIC},))
    x = torch.randn(3, 2, 5, 8)
    rewrites(FoldFixed, gm, x)
    assert count(gm, aten.linear.default) == 0 and count(gm, aten.expand.default) == 1
    assert count(gm, QUANTIZE) == count(gm, DEQUANTIZE)


def test_an_attention_that_nothing_reaches_is_one_constant() -> None:
    class Memory(Learned):
        def forward(self, x: Tensor) -> Tensor:
            own = self.proj(self.learned)
            return x + F.scaled_dot_product_attention(own, own, own)

    x = torch.randn(2, 2, 3, 8)
    gm = graph_of(Memory(queries=True, project=True), x)
    rewrites(FoldFixed, gm, x)
    assert len(gm.graph.find_nodes(op="get_attr")) == 1


def test_what_is_no_product_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.proj = nn.Embedding(7, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.table(torch.arange(4)) + self.proj(y)

    assert declines(FoldFixed, graph_of(Table(), torch.randn(4, 8), torch.randn(4, 8))) == []
    monkeypatch.setattr(fixed, "MAX_BYTES", 100)
    reasons = declines(FoldFixed, graph_of(Positions(), torch.randn(2, 4, 8)))
    assert reasons[0] == "no input reaches this [4, 8], which is too large to store"


def test_what_every_call_draws_or_reads_stays() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.proj(torch.rand_like(x)) + self.proj(x[:1])

    assert declines(FoldFixed, graph_of(Drawn(), torch.randn(2, 8))) == []
