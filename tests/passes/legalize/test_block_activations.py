"""Activations in blocks of 1 x 128 that go to anything but a weight in blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.formats import FP8_1X128
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.legalize.block_activations import SpellOutBlockActivations
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.blocks import block_graph, error, in_blocks


@pytest.mark.parametrize("width", [256, 100])
@pytest.mark.parametrize("lead", [(5,), (2, 5)], ids=str)
def test_a_layer_in_floating_point(lead: tuple[int, ...], width: int) -> None:
    gm = block_graph(nn.Linear(width, 8), torch.randn(*lead, width), weight=None, dynamic_shapes=({0: DYNAMIC},))
    rewrites(SpellOutBlockActivations, gm, torch.randn(lead[0] + 1, *lead[1:], width), rtol=1e-5, atol=1e-5)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (0, 1, 1)
    assert (count(gm, aten.constant_pad_nd.default), count(gm, aten.slice.Tensor)) == (width == 100, width == 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_output_quantizer_that_two_read(dtype: torch.dtype) -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(192)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return y.relu(), y.neg()

    x = torch.randn(4, 192).to(dtype)
    gm = graph_of(Readers().to(dtype), x)
    InsertQdq({s: Quantizer(FP8_1X128, None) for s in find_sites(gm) if s.operand == "output"})(gm)
    rewrites(SpellOutBlockActivations, gm, x)  # the values are the same, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_and_blocks_of_padding_are_zeros(dtype: torch.dtype) -> None:
    """What a block of zeros is divided by is not its amax: 0 / 0 would be NaN."""
    x = torch.randn(4, 300).to(dtype)
    x[1], x[2, 128:] = 0, 0
    gm = block_graph(nn.Linear(300, 8, bias=False).to(dtype), x, weight=None)
    rewrites(SpellOutBlockActivations, gm, x, rtol=1e-3, atol=1e-3)
    (got,) = run(gm, x)
    assert got.isfinite().all() and bool((got[1] == 0).all())


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 300), power=st.integers(-20, 15))
def test_codes_are_those_of_an_oracle(rows: int, width: int, power: int) -> None:
    x = torch.randn(rows, width) * 2.0**power
    gm = block_graph(nn.Linear(width, width, bias=False), x, weight=None)
    with torch.no_grad():
        gm.get_parameter("weight").copy_(torch.eye(width))
    SpellOutBlockActivations()(gm)
    (got,) = run(gm, x)
    assert error(got, in_blocks(x.numpy(), 1)) <= 1e-6


def test_weights_in_blocks_are_no_activations() -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), activation=None)
    assert declines(SpellOutBlockActivations, gm) == []
