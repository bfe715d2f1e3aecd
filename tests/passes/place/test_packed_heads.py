"""Packed Q, K and V: one split along the heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten
from passes.normalize.views import ViewsToReshape
from passes.place.packed_heads import SplitPackedHeads
from tests.passes.support import DYNAMIC, count, declines, graph_of, only_call, rewrites, run


class Packed(nn.Module):
    """Q, K and V of one linear layer; `take` is how a model tells them apart, `spy` what else it reads."""

    def __init__(self, take: str = "unbind", spy: str | None = None, axes: tuple[int, ...] = (2, 0, 3, 1, 4)) -> None:
        super().__init__()
        self.take, self.spy, self.axes = take, spy, axes
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        packed = self.qkv(x)
        view = packed.reshape(batch, length, 3, 2, 4)
        heads = view.permute(self.axes)
        q, k, v = heads.unbind(0) if self.take == "unbind" else (heads[0], heads[1], heads[-1])
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        other = {"packed": packed, "view": view, "heads": heads}
        return (y, other[self.spy] * 2) if self.spy else y


def packed(x: Tensor, *args: Any, dynamic_shapes: Any = None) -> GraphModule:
    gm = graph_of(Packed(*args), x, dynamic_shapes=dynamic_shapes)
    ViewsToReshape()(gm)
    return gm


@pytest.mark.parametrize("take", ["unbind", "select"])
def test_one_split_along_the_heads(take: str) -> None:
    x = torch.randn(2, 5, 8)
    gm = packed(x, take)
    rewrites(SplitPackedHeads, gm, x)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([2, 2, 2], 1)
    assert count(gm, aten.unbind.int, aten.select.int, aten.permute.default) == 0


def test_dynamic_batch_and_length() -> None:
    x = torch.randn(2, 5, 8)
    gm = packed(x, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    rewrites(SplitPackedHeads, gm, x)
    run(gm, torch.randn(3, 7, 8))


def test_another_user_of_the_linear_keeps_its_values() -> None:
    x = torch.randn(2, 5, 8)
    rewrites(SplitPackedHeads, packed(x, "unbind", "packed"), x)


def test_declines_when_the_packed_heads_are_read_as_a_whole() -> None:
    reasons = declines(SplitPackedHeads, packed(torch.randn(2, 5, 8), "unbind", "heads"))
    assert reasons == ["the packed heads are used in another way than one by one"]


@pytest.mark.parametrize(("spy", "axes"), [("view", (2, 0, 3, 1, 4)), (None, (2, 1, 3, 0, 4))])
def test_leaves_other_layouts(spy: str | None, axes: tuple[int, ...]) -> None:
    assert declines(SplitPackedHeads, packed(torch.randn(2, 5, 8), "unbind", spy, axes)) == []
