"""Group norms as sums and products, by the size of their groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.graph import aten
from passes.legalize.group_norm import SpellOutGroupNorm
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites


@settings(max_examples=15)
@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 3),
    space=st.lists(st.integers(1, 5), max_size=3),
    affine=st.booleans(),
    dynamic=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_values_stay(
    groups: int, width: int, space: list[int], affine: bool, dynamic: bool, dtype: torch.dtype
) -> None:
    if width * len(space) == 0 or (width == 1 and not space):
        width = 2  # torch refuses the norm of one value
    model = nn.GroupNorm(groups, groups * width, eps=1e-3, affine=affine)
    if affine:
        nn.init.normal_(model.weight)
        nn.init.normal_(model.bias)
    x = torch.randn(3, groups * width, *space, dtype=dtype)
    gm = graph_of(model.to(dtype), x, dynamic_shapes=({0: DYNAMIC},) if dynamic else None)
    # the result is rounded once, from a sum in float32, as torch does
    rewrites(SpellOutGroupNorm, gm, x, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5)
    assert not count(gm, aten.group_norm.default)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4, float("nan"), float("inf")])
def test_special_values(value: float) -> None:
    x = torch.randn(2, 8, 3)
    x[0] *= value
    rewrites(SpellOutGroupNorm, graph_of(nn.GroupNorm(2, 8), x), x, rtol=1e-5, atol=1e-5)


def test_an_empty_batch() -> None:
    gm = graph_of(nn.GroupNorm(2, 8), torch.randn(3, 8, 4), dynamic_shapes=({0: DYNAMIC},))
    rewrites(SpellOutGroupNorm, gm, torch.randn(0, 8, 4))


@pytest.mark.parametrize("groups", [1, 4])
def test_large_groups_and_those_of_any_size_stay(groups: int) -> None:
    channels, length = 48, 12288 // (48 // groups)
    model = nn.GroupNorm(groups, channels)
    x = torch.randn(1, channels, length)
    rewrites(SpellOutGroupNorm, graph_of(model, x), x, rtol=1e-4, atol=1e-4)
    assert declines(SpellOutGroupNorm, graph_of(model, torch.randn(1, channels, length + 1))) == []
    assert declines(SpellOutGroupNorm, graph_of(model, x, dynamic_shapes=({2: DYNAMIC},))) == []


def test_two_axes_are_always_spelled_out() -> None:
    x = torch.randn(2, 12290)
    rewrites(SpellOutGroupNorm, graph_of(nn.GroupNorm(1, 12290), x), x, rtol=1e-4, atol=1e-4)
