"""Products in float16 on a CPU without arithmetic for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten, calls, dtype
from passes.lower.cpu import half
from passes.lower.cpu.half import PRODUCTS, WidenHalfProducts
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites
from tests.passes.support import Attention, Mlp

HALF = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(autouse=True)
def _without_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "multiplies_float16", lambda: False)


class Products(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize("length", [3, DYNAMIC], ids=str)
def test_products_and_layers(length: Any) -> None:
    x = torch.randn(4, 3, 8).half()
    shapes = ({1: length},) if length is DYNAMIC else None
    gm = graph_of(Mlp().half(), x, dynamic_shapes=shapes)
    rewrites(WidenHalfProducts, gm, torch.randn(4, 5, 8).half() if shapes else x, fired=2, **HALF)
    gm = graph_of(Products(), x, torch.randn(4, 8, 5).half())
    rewrites(WidenHalfProducts, gm, x, torch.randn(4, 8, 5).half(), **HALF)
    assert {dtype(node) for node in calls(gm.graph, *PRODUCTS)} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_attention_keeps_its_options(options: dict[str, Any]) -> None:
    x = torch.randn(1, 5, 16).half()
    gm = graph_of(Attention(**options).half(), x)
    rewrites(WidenHalfProducts, gm, x, fired=4, **HALF)
    assert count(gm, SDPA) == 1


def test_a_mask_in_float16_and_one_of_booleans() -> None:
    x = torch.randn(1, 5, 16).half()
    for mask in (torch.randn(1, 1, 5, 5).half(), torch.ones(1, 1, 5, 5, dtype=torch.bool)):
        gm = graph_of(Attention().half(), x, mask)
        rewrites(WidenHalfProducts, gm, x, mask, fired=4, **HALF)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_stay(to: torch.dtype) -> None:
    assert declines(WidenHalfProducts, graph_of(Mlp().to(to), torch.randn(3, 8).to(to))) == []


def test_a_cpu_with_float16_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "multiplies_float16", lambda: True)
    assert declines(WidenHalfProducts, graph_of(Mlp().half(), torch.randn(3, 8).half())) == []


def test_a_second_reader_of_an_operand_keeps_float16() -> None:
    class Residual(nn.Module):
        def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
            b = a.sin()
            return b @ b.transpose(-1, -2), b

    x = torch.randn(3, 8).half()
    gm = graph_of(Residual(), x)
    rewrites(WidenHalfProducts, gm, x, **HALF)
    assert count(gm, aten.sin.default) == 1
