"""Heads whose values have another width than their keys, padded with zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten, shape
from passes.ir import ATTENTION
from passes.legalize.attention import DecomposeAttention
from passes.legalize.attention_operator import is_long_causal
from passes.legalize.value_width import PadHeadWidths
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import insert

S = torch.tensor(0.02)


class Widths(nn.Module):
    """Attention over heads of width `keys`, with values of width `values` that are returned as well."""

    def __init__(self, keys: int, values: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, v = x[..., : self.keys] * 2, x[..., : self.values] + 1
        return nn.functional.scaled_dot_product_attention(q, q.sin(), v, scale=1.0, is_causal=True).relu(), v


def fused(keys: int, values: int, **options: Any) -> GraphModule:
    gm = graph_of(Widths(keys, values), torch.randn(2, 3, 5, 12), **options)
    insert(gm, {"q": S, "k": S, "v": S})
    assert FuseAttentionQdq()(gm).modified
    return gm


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("keys", "values"), [(12, 8), (8, 12)])
def test_the_narrower_side_is_padded(keys: int, values: int, dynamic: bool) -> None:
    gm = fused(keys, values, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC},) if dynamic else None)
    rewrites(PadHeadWidths, gm, torch.randn(4 if dynamic else 2, 3, 7 if dynamic else 5, 12), rtol=1e-5, atol=1e-5)
    attention = only_call(gm, ATTENTION)
    assert [shape(operand)[-1] for operand in attention.args[:3]] == [12] * 3  # type: ignore[arg-type]
    assert shape(attention)[-1] == 12
    assert count(gm, aten.constant_pad_nd.default, aten.pad.default) == 0  # of unknown width to TensorRT


def test_equal_widths_are_left() -> None:
    assert declines(PadHeadWidths, fused(8, 8)) == []


def test_only_then_the_quantized_attention_operator_takes_it() -> None:
    gm = fused(12, 8, dynamic_shapes=({2: DYNAMIC},))
    assert not is_long_causal(only_call(gm, ATTENTION))
    PadHeadWidths()(gm)
    assert is_long_causal(only_call(gm, ATTENTION))


def test_decomposed_without_padding_it_is_the_same() -> None:
    gm, padded, x = fused(12, 8), fused(12, 8), torch.randn(2, 3, 5, 12)
    PadHeadWidths()(padded)
    DecomposeAttention()(gm)
    for a, b in zip(run(gm, x), run(padded, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
