"""Constants beyond the compute dtype are refused, masks among them are clamped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.errors import PassError
from passes.graph import aten
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.ranges import before_softmax
from passes.testing import count, graph_of

HALF = (torch.float32, torch.float16)


class Constant(nn.Module):
    """A linear layer whose bias, or a buffer that is multiplied, holds `value`."""

    def __init__(self, kind: str, value: float) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.register_buffer("factor", torch.full((4,), value if kind == "factor" else 1.0))
        if kind == "bias":
            self.linear.bias.data[1] = value

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


@pytest.mark.parametrize(("kind", "name"), [("bias", "linear.bias"), ("factor", "factor")])
def test_a_constant_beyond_float16_is_named(kind: str, name: str) -> None:
    model, x = Constant(kind, 7e4), torch.randn(2, 4)
    with pytest.raises(PassError, match=rf"{name} holds numbers up to 7e\+04, and torch.float16 ends at 65504"):
        ConvertComputeDtype(*HALF)(graph_of(model, x))
    for target in (torch.bfloat16, torch.float16):
        fits = Constant(kind, 7e4 if target is torch.bfloat16 else 6e4)
        assert torch.isfinite(ConvertComputeDtype(torch.float32, target)(graph_of(fits, x)).graph_module(x)[0]).all()


class Masked(nn.Module):
    """Scores whose mask is a buffer, put on in one of the ways of models."""

    def __init__(self, way: str, hidden: float) -> None:
        super().__init__()
        self.way, self.q = way, nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((4, 4), hidden).triu(1))
        self.register_buffer("hidden", torch.tensor(hidden))
        self.mask[0] = hidden  # a row that is hidden as a whole

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ x.transpose(-1, -2)
        if self.way == "add":
            scores = scores + self.mask
        elif self.way == "where":
            scores = torch.where(self.mask < 0, self.hidden, scores)
        else:
            scores = torch.maximum(scores + self.mask, self.hidden)
        return scores.softmax(-1) @ x


@pytest.mark.everyday(3)
@pytest.mark.parametrize("way", ["add", "where", "maximum"])
@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min])
def test_a_mask_in_a_buffer_stays_finite_in_float16(way: str, hidden: float) -> None:
    torch.manual_seed(0)
    model, x = Masked(way, hidden).eval(), torch.randn(1, 4, 8)
    gm = graph_of(model, x)
    ConvertComputeDtype(*HALF)(gm)
    found = gm(x)[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, model(x), rtol=0.01, atol=0.01)


def test_a_mask_that_is_filled_once_more_stays_finite() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            mask = torch.where(valid, torch.zeros(()), torch.finfo(torch.float32).min)
            mask = mask.masked_fill(x.sum(-1) > 1e3, -1e4)
            return (x @ x.transpose(-1, -2) + mask).softmax(-1) @ x

    torch.manual_seed(0)
    x, valid = torch.randn(1, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    valid[1] = False
    gm = graph_of(Net(), x, valid)
    ConvertComputeDtype(*HALF)(gm)
    torch.testing.assert_close(gm(x, valid)[0], Net()(x, valid), rtol=0.01, atol=0.01)


def test_a_mask_that_float16_holds_is_not_clamped() -> None:
    gm = graph_of(Masked("add", -1e4), torch.randn(1, 4, 8))
    ConvertComputeDtype(*HALF)(gm)
    assert count(gm, aten.clamp.default) == 0


def test_what_only_a_softmax_reads() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            read = x.sin()
            return ((x.cos() + mask).softmax(-1) + read).exp(), (read + mask).softmax(-1)

    gm = graph_of(Net(), torch.randn(2, 3), torch.randn(2, 3))
    assert {node.name for node in before_softmax(gm.graph)} == {"cos", "add", "add_2"}


def test_what_only_a_choice_of_places_reads() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            hidden = x.cos() + mask
            values, places = (x.sin() + mask).topk(2)
            return hidden.topk(2).indices, hidden.sort().indices, hidden.argmax(-1), values, places

    gm = graph_of(Net(), torch.randn(2, 3), torch.randn(2, 3))
    assert {node.name for node in before_softmax(gm.graph)} == {"cos", "add"}
