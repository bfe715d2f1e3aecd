from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from passes.graph import aten, is_call
from passes.normalize.attention_axes import AttentionToFourAxes
from passes.sdpa import SDPA, Attention
from passes.testing import DYNAMIC, blank, declines, graph_of, only_call, returns, rewrites

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
S, T, D = 5, 7, 8


def attention(query: tuple[int, ...], key: tuple[int, ...], mask: tuple[int, ...] | None, **options: Any) -> Any:
    """A graph of one attention whose query and key have these leading axes, and its inputs."""
    inputs = [torch.randn(*query, S, D), torch.randn(*key, T, D), torch.randn(*key, T, D)]
    if mask is not None:
        inputs.append(torch.rand(mask) > 0.3)
        inputs[-1][..., 0] = True
    gm, emit, nodes = blank(*inputs)
    node = emit(SDPA, *nodes[:3], nodes[3] if mask else None, 0.0, options.pop("is_causal", False), **options)
    return returns(gm, node), inputs


@pytest.mark.parametrize(
    ("query", "key", "mask", "shape"),
    [
        ((), (), None, (1, 1)),
        ((), (), (S, T), (1, 1)),
        ((4,), (4,), None, (1, 4)),
        ((4,), (4,), (4, S, T), (1, 4)),
        ((4,), (1,), (1, 1, T), (1, 4)),
        ((2, 3, 4), (2, 3, 4), None, (6, 4)),
        ((2, 3, 4), (2, 3, 4), (S, T), (6, 4)),
        ((2, 3, 4), (2, 3, 4), (3, 1, S, T), (6, 4)),  # one for each window
        ((2, 3, 4), (2, 3, 4), (1, 1, 4, S, T), (6, 4)),
        ((2, 3, 4), (2, 3, 4), (2, 1, 1, 1, T), (6, 4)),
        ((2, 3, 4), (2, 3, 1), (3, 1, S, T), (2, 12)),  # a key head for a group
        ((2, 3, 4), (2, 3, 1), (2, 3, 4, S, T), (2, 12)),
        ((2, 3, 4, 6), (2, 3, 4, 6), (4, 1, S, 1), (24, 6)),
        ((1, 4), (2, 4), None, (2, 4)),  # learned queries
        ((4,), (2, 4), (2, 1, 1, T), (2, 4)),
        ((2, 4), (2, 1), None, (2, 4)),
        ((2, 1, 4), (2, 3, 4), None, (6, 4)),
        ((3, 1), (3, 1), (S, T), (1, 3)),  # one head and a mask
        ((3, 1), (3, 1), (1, S, T), (1, 3)),
        ((3, 1), (3, 1), (3, 1, S, T), (1, 3)),
        ((3, 1), (3, 1), (3, 1, 1, T), (1, 3)),
    ],
)
def test_fires(query: Any, key: Any, mask: Any, shape: tuple[int, int]) -> None:
    gm, inputs = attention(query, key, mask)
    rewrites(AttentionToFourAxes, gm, *inputs, **CLOSE)
    found = Attention.of(only_call(gm, SDPA))
    assert found.q.meta["val"].shape == (*shape, S, D) and found.k.meta["val"].ndim == 4
    assert found.mask is None or found.mask.meta["val"].ndim <= 4


class Maps(nn.Module):
    """Attention on three axes over what a convolution makes, `[B*H, D, S]`, and its result as that again, or summed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.reshape(4, 8, -1).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, q.permute(0, 1, 2).cos(), q.sin())
        return y.transpose(-1, -2).reshape(x.shape), y.sum(-1)


def test_an_axis_comes_before_a_transpose_and_goes_behind_one() -> None:
    x = torch.randn(1, 32, 2, 3)
    gm = graph_of(Maps(), x)
    rewrites(AttentionToFourAxes, gm, x, fired=2, **CLOSE)
    node = only_call(gm, SDPA)
    query = node.args[0]
    assert isinstance(query, Node) and is_call(query, aten.transpose.int)
    assert is_call(query.args[0], aten.unsqueeze.default)
    assert {user.target for user in node.users} == {aten.transpose.int, aten.squeeze.dim}


class OneQuery(nn.Module):
    """The axis of the one query goes, and what the model then transposes is the heads and their widths."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, k.sin()).squeeze(2).transpose(1, 2)


def test_another_axis_goes_where_the_model_lets_it_go() -> None:
    gm = graph_of(OneQuery(), torch.randn(2, 3, 1, D), torch.randn(2, 3, T, D))
    assert declines(AttentionToFourAxes, gm) == []


@pytest.mark.parametrize(("leading", "mask"), [((3, 1), None), ((1, 1), (S, T)), ((3, 2), (S, T))])
def test_what_is_no_single_head_with_a_mask_is_left(leading: Any, mask: Any) -> None:
    assert declines(AttentionToFourAxes, attention(leading, leading, mask)[0]) == []


@pytest.mark.parametrize(("query", "key"), [((4,), (2,)), ((2, 3, 4), (2, 3, 2))])
def test_grouped_heads_and_a_causal_mask(query: Any, key: Any) -> None:
    gm, inputs = attention(query, key, None, enable_gqa=True, is_causal=True, scale=0.3)
    rewrites(AttentionToFourAxes, gm, *inputs, **CLOSE)
    found = Attention.of(only_call(gm, SDPA))
    assert found.enable_gqa and found.is_causal and found.scale == 0.3
    assert (found.q.meta["val"].shape[1], found.k.meta["val"].shape[1]) == (4, 2)


@pytest.mark.parametrize(("query", "key", "options"), [((2, 4), (2, 4), {}), ((2, 4), (2, 2), {"enable_gqa": True})])
def test_leaves_four_axes(query: Any, key: Any, options: dict[str, Any]) -> None:
    gm, _ = attention(query, key, (2, 1, S, T), **options)
    assert declines(AttentionToFourAxes, gm) == []


@pytest.mark.parametrize(("axis", "heads"), [(1, 4), (2, 1)], ids=["windows", "heads"])
def test_dynamic_shapes(axis: int, heads: int) -> None:
    """A number of heads that is not known goes into the batch."""

    class Windows(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, mask)

    inputs = torch.randn(2, 3, 4, S, D), torch.rand(2, 1, 1, S, S) > 0.3
    inputs[1][..., 0] = True
    dynamic = ({0: DYNAMIC, axis: DYNAMIC, 3: DYNAMIC}, {0: DYNAMIC, 3: DYNAMIC, 4: DYNAMIC})
    gm = graph_of(Windows(), *inputs, dynamic_shapes=dynamic)
    rewrites(AttentionToFourAxes, gm, *inputs, **CLOSE)
    assert Attention.of(only_call(gm, SDPA)).q.meta["val"].shape[1] == heads
