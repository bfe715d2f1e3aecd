"""Layers of learned vectors that are repeated for a dynamic batch are computed once, and stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.fold.expands import ExpandsLast
from passes.fold.fixed import FoldFixed
from passes.graph import aten
from passes.normalize.views import ViewsToReshape
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run


class Learned(nn.Module):
    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        self.queries, self.positions = nn.Parameter(torch.randn(1, 3, 8)), nn.Parameter(torch.randn(3, 8))
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x, self.queries.expand(x.shape[0], -1, -1))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def of_heads(t: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(t, t, t).transpose(1, 2).flatten(2)


FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "linear": (lambda m, x, q: x + m.layer(q), 1),
    "norm, positions and two layers": (lambda m, x, q: x + m.layer(m.layer(m.norm(q + m.positions)).relu()), 5),
    "a row without an axis for the batch": (lambda m, x, q: x + m.layer(m.positions.expand(x.shape[0], 3, 8)), 1),
    "heads": (lambda m, x, q: F.scaled_dot_product_attention(heads(m.layer(q)), heads(x), heads(x)), 3),
    "attention among themselves": (lambda m, x, q: x + of_heads(heads(m.layer(q))), 6),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", FORMS)
def test_no_layer_runs_at_each_call(name: str) -> None:
    form, fired = FORMS[name]
    x = torch.randn(2, 3, 8)
    gm = graph_of(Learned(form), x, dynamic_shapes=({0: DYNAMIC},))
    ViewsToReshape()(gm)
    want = run(gm, torch.cat([x, -x]))[0]
    rewrites(ExpandsLast, gm, x, fired=fired)
    FoldFixed()(gm)
    assert count(gm, aten.linear.default) == 0
    assert count(gm, SDPA) == (name == "heads")
    torch.testing.assert_close(run(gm, torch.cat([x, -x]))[0], want, rtol=0, atol=0)


STAY: dict[str, Callable[..., Tensor]] = {
    "an input": lambda m, x, q: m.layer(x + q),
    "along the last axis": lambda m, x, q: x + m.layer(m.positions[:, :1].expand(x.shape[0], 3, 8)),
    "no layer": lambda m, x, q: x + (q * 2).relu(),
}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    gm = graph_of(Learned(STAY[name]), torch.randn(2, 3, 8), dynamic_shapes=({0: DYNAMIC},))
    ViewsToReshape()(gm)
    assert declines(ExpandsLast, gm) == []
