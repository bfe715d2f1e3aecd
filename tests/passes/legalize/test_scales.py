"""Scales in the dtype of what they scale, positive and finite there."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from passes.errors import PassError
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.ir import DYNAMIC_QUANTIZE
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.scales import RoundScales, round_scale
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites
from tests.passes.support import Attention, insert


def half_graph(scale: torch.Tensor, target: torch.dtype = torch.float16, operand: str = "input") -> GraphModule:
    gm = graph_of(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {operand: scale})
    if target != torch.float32:
        ConvertComputeDtype(torch.float32, target)(gm)
    return gm


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operand", ["input", "weight"])
def test_scales_are_rounded_once_for_both_operators(target: torch.dtype, operand: str) -> None:
    scale = torch.rand(4, 1) + 0.01 if operand == "weight" else torch.tensor(0.0317)
    gm = half_graph(scale, target, operand)
    # the scale moves by half a unit in the last place, and codes at a tie by one step
    rewrites(RoundScales, gm, torch.randn(3, 4), rtol=0.1, atol=0.1)
    name = f"0.{operand}_scale"
    assert gm.get_buffer(name).dtype is target
    assert torch.equal(gm.get_buffer(name), scale.to(target))
    assert len(gm.graph.find_nodes(op="get_attr")) == len({n.target for n in gm.graph.find_nodes(op="get_attr")})


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf"), 0.0, -0.5])
def test_a_scale_that_the_dtype_cannot_hold_is_an_error_with_its_name(value: float) -> None:
    with pytest.raises(PassError, match=r"0\.input_scale is .*torch\.float16.*bfloat16 or float32"):
        RoundScales()(half_graph(torch.tensor(value)))


@pytest.mark.parametrize(("worst", "named"), [(1e6, "1e[+]06"), (-0.5, "-0.5")])
def test_the_scale_that_cannot_be_held_is_named(worst: float, named: str) -> None:
    gm = half_graph(torch.tensor([[0.1], [worst], [0.2], [0.3]]), operand="weight")
    with pytest.raises(PassError, match=rf"0\.weight_scale is {named}, which"):
        RoundScales()(gm)


@pytest.mark.parametrize("value", [1e-9, 1e6])
def test_what_float16_cannot_hold_bfloat16_can(value: float) -> None:
    assert RoundScales()(half_graph(torch.tensor(value), torch.bfloat16)).modified


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_needs_no_rounding_is_checked_too(value: float) -> None:
    with pytest.raises(PassError, match=r"0\.input_scale"):
        RoundScales()(half_graph(torch.tensor(value), torch.float32))


def test_a_scale_below_float16_becomes_its_least_number_and_is_listed() -> None:
    gm, x = half_graph(torch.tensor([[0.1], [1e-10], [0.2], [0.3]]), operand="weight"), torch.randn(3, 4)
    scales = RoundScales()
    scales(gm)
    least = 2.0**-24
    assert gm.get_buffer("0.weight_scale")[1] == least
    (notice,) = scales.log.notices
    assert "1 of 4 in 0.weight_scale are 1e-10" in notice and "5.96e-08 takes its place" in notice
    with torch.no_grad():
        assert torch.isfinite(gm(x)[0]).all()


def test_scales_with_digits_enough_are_not_listed() -> None:
    scales = RoundScales()
    scales(half_graph(torch.tensor(3e-5)))  # subnormal, with 9 bits
    assert scales.log.notices == [] and scales.log.declined == []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(1e-12, 6e4), min_size=1, max_size=8), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_rounded_scale_is_positive_near_and_saturates_nothing_where_digits_are_few(
    values: list[float], to: torch.dtype
) -> None:
    scale = torch.tensor(values)
    rounded, moved = round_scale(scale, to)
    numbers = np.float16 if to is torch.float16 else ml_dtypes.bfloat16
    nearest = torch.from_numpy(scale.numpy().astype(numbers).astype(np.float64))
    assert rounded.dtype is to and bool((rounded > 0).all() and rounded.isfinite().all())
    for own, near, new, up in zip(scale.double(), nearest, rounded.double(), moved, strict=True):
        if up:
            assert new > own and new - own < 2.0**-24  # the next number of float16
        else:
            assert new == near and abs(new - own) <= own * 2**-7


def test_nothing_to_do_in_float32_and_for_measured_scales() -> None:
    gm = half_graph(torch.tensor(0.1), torch.float32)
    assert declines(RoundScales, gm) == []
    assert count(gm, DYNAMIC_QUANTIZE) == 0


def test_the_scale_of_a_softmax_is_rounded_with_the_others() -> None:
    x = torch.randn(1, 3, 16)
    gm = graph_of(Attention(scale=1.0), x)
    insert(gm, {operand: torch.tensor(0.02) for operand in "qkv"})
    FuseAttentionQdq()(gm)
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    rewrites(RoundScales, gm, x, fired=4, rtol=0.1, atol=0.1)
    assert gm.get_buffer("softmax_scale").dtype is torch.float16
