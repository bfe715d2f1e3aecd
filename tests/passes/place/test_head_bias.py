"""Zeros as the bias of packed heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import argument, aten, calls
from passes.normalize.views import ViewsToReshape
from passes.place.head_bias import BiasPackedHeads
from passes.testing import DYNAMIC, declines, graph_of, rewrites
from tests.passes.support import insert, scale_of


class Heads(nn.Module):
    """Six heads of 4 and how they are read: split, before the transpose or behind, or as a whole."""

    def __init__(self, form: str, *, bias: bool = False) -> None:
        super().__init__()
        self.form, self.qkv = form, nn.Linear(8, 24, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.qkv(x)
        heads = y.reshape(*x.shape[:2], 6, 4)
        if self.form == "behind":
            return tuple(heads.transpose(1, 2).split_with_sizes([2, 2, 2], 1))
        parts = heads.split_with_sizes([2, 2, 2], 2) if self.form != "columns" else y.split_with_sizes([8, 8, 8], 2)
        return (*parts, y.sin()) if self.form == "shared" else tuple(parts)


def quantized(form: str, *, bias: bool = False, dynamic: bool = False) -> tuple[GraphModule, Tensor]:
    module, x = Heads(form, bias=bias), torch.randn(2, 5, 8)
    gm = graph_of(module, x, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},) if dynamic else None)
    ViewsToReshape()(gm)
    insert(gm, {"input": scale_of(x), "weight": scale_of(module.qkv.weight)})
    return gm, x


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["before", "behind"])
def test_the_numbers_are_the_same(form: str, dynamic: bool) -> None:
    gm, x = quantized(form, dynamic=dynamic)
    rewrites(BiasPackedHeads, gm, x, rtol=0, atol=0)
    (linear,) = calls(gm.graph, aten.linear.default)
    assert argument(linear, "bias").target == "qkv.bias"
    assert declines(BiasPackedHeads, gm) == []  # and not a second time


@pytest.mark.parametrize(("form", "bias"), [("columns", False), ("shared", False), ("before", True)])
def test_what_is_no_packed_heads_or_has_a_bias_is_left(form: str, bias: bool) -> None:
    gm, _ = quantized(form, bias=bias)
    assert declines(BiasPackedHeads, gm) == []


def test_a_layer_in_half_is_left() -> None:
    assert declines(BiasPackedHeads, graph_of(Heads("before"), torch.randn(2, 5, 8))) == []
