"""Rows that a mask picks, worked on and put back: loops over experts and their like, on all rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.formats import FP8, FP8_PER_TOKEN
from passes.graph import aten
from passes.legalize.picked_rows import PickedRowsToAll
from passes.normalize.masked_writes import MaskedWritesToWhere
from passes.normalize.spellings import PlainSpellings
from passes.normalize.views import ViewsToReshape
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import count, declines, graph_of, rewrites, run
from tests.passes.support import Mlp, insert

T, WIDTH, EXPERTS, TOP = 12, 8, 3, 2
X = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(0))


class Loop(nn.Module):
    """A mixture of experts: each works on the tokens that chose it."""

    def __init__(self, choices: int = EXPERTS) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Mlp(WIDTH, 16) for _ in range(EXPERTS))
        self.choices = choices

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x)[:, : self.choices].softmax(-1).topk(TOP, -1)
        chosen = F.one_hot(index, EXPERTS).permute(2, 1, 0)  # [E,K,T]
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(chosen[number])
            result = result.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return result


class Picks(nn.Module):
    """`function(layer, x)`."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def put(y: Tensor, index: object, rows: Tensor) -> Tensor:
    y = y.clone()
    y[index] = rows
    return y


PICKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "put by a mask": lambda layer, x: put(x, x[:, 0] > 0, layer(x[x[:, 0] > 0])),
    "put by its places": lambda layer, x: put(x, (m := torch.where(x[:, 0] > 0)), layer(x[m]).relu()),
    "added by a mask": lambda layer, x: x.index_put((x[:, 0] > 0,), layer(x[x[:, 0] > 0]), accumulate=True),
    "in place": lambda layer, x: put(x, (m := x[:, 0] > 0), x[m] + layer(x[m])),
}


def test_a_loop_over_experts() -> None:
    gm = graph_of(Loop(), X)
    rewrites(PickedRowsToAll, gm, X, fired=EXPERTS, rtol=1e-5, atol=1e-6)
    assert count(gm, aten.index.Tensor, aten.index_add.default) == 0


@pytest.mark.everyday(1)
@pytest.mark.parametrize("quantized", ["fp8", "fp8 per token"])
def test_a_loop_over_quantized_experts(quantized: str) -> None:
    gm = graph_of(Loop(), X)
    if quantized == "fp8":
        insert(gm, {"input": torch.tensor(0.02), "weight": torch.tensor(0.01)})
    else:
        sites = {site: Quantizer(FP8_PER_TOKEN, None) for site in find_sites(gm) if site.operand == "input"}
        weights = {site: Quantizer(FP8, torch.tensor(0.01)) for site in find_sites(gm) if site.operand == "weight"}
        InsertQdq(sites | weights)(gm)
    rewrites(PickedRowsToAll, gm, X, fired=EXPERTS, rtol=1e-5, atol=1e-6)


def test_an_expert_that_nobody_chose_and_one_that_overflows() -> None:
    model = Loop(choices=2)
    gm = graph_of(model, X)
    expected = run(gm, X)[0]
    with torch.no_grad():
        gm.get_parameter("experts.2.down.weight").mul_(torch.inf)
    PickedRowsToAll()(gm)
    torch.testing.assert_close(run(gm, X)[0], expected, rtol=1e-5, atol=1e-6)


def mixtral(x: Tensor, index: Tensor) -> Tensor:
    """As it was written with a batch of one, which is taken away again."""
    return x[None, index].reshape(-1, WIDTH)


def squeezed(x: Tensor, index: Tensor) -> Tensor:
    return x[None, index].squeeze(0)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("pick", [mixtral, squeezed])
@pytest.mark.parametrize("adds", [False, True], ids=["+=", "index_add"])
def test_other_loops_over_experts(pick: Callable[[Tensor, Tensor], Tensor], adds: bool) -> None:
    class Other(Loop):
        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).softmax(-1).topk(TOP, -1)
            chosen = F.one_hot(index, EXPERTS).permute(2, 1, 0)
            result = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                choice, token = torch.where(chosen[number])
                rows = expert(pick(x, token)) * weights[token, choice, None]
                if adds:
                    result.index_add_(0, token, rows)
                else:
                    result[token] += rows
            return result

    gm = graph_of(Other(), X)
    ViewsToReshape()(gm)
    rewrites(PlainSpellings, gm, X, fired=EXPERTS)
    rewrites(PickedRowsToAll, gm, X, fired=EXPERTS, rtol=1e-5, atol=1e-6)
    assert count(gm, aten.index.Tensor, aten.index_add.default, aten.index_put.default) == 0


def test_columns_that_are_counted_from_the_end() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            token = mask.nonzero()[:, -1]
            return x.index_add(0, token, x[token].relu())

    mask = torch.rand(2, T) > 0.5
    rewrites(PickedRowsToAll, graph_of(Last(), X, mask), X, mask, rtol=1e-5, atol=1e-6)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("function", PICKS.values(), ids=PICKS.keys())
def test_other_ways_to_pick(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    gm = graph_of(Picks(function), X)
    rewrites(PickedRowsToAll, gm, X, rtol=1e-5, atol=1e-6)
    assert count(gm, aten.index_put.default) == 0


class TextAndSound(nn.Module):
    """Norms and layers of their own for the tokens of two kinds (Higgs Audio): scattered where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, sound: Tensor) -> Tensor:
        x = x.masked_scatter(sound.unsqueeze(-1), self.norms[0](x[sound]))
        x = x.masked_scatter(~sound.unsqueeze(-1), self.norms[1](x[~sound]))
        text = self.layers[1](x[~sound])
        x = x.clone()
        x[~sound] += text
        return x.masked_scatter(sound[..., None].expand_as(x), self.layers[0](x[sound]))


def test_rows_that_are_scattered_where_they_were_picked() -> None:
    x, sound = X.reshape(2, T // 2, WIDTH), torch.rand(2, T // 2, generator=torch.Generator().manual_seed(0)) > 0.5
    model = TextAndSound()
    gm = graph_of(model, x, sound)
    rewrites(MaskedWritesToWhere, gm, x, sound, fired=3)
    rewrites(PickedRowsToAll, gm, x, sound, fired=4, rtol=1e-5, atol=1e-6)
    assert count(gm, aten.index_put.default, aten.cumsum.default) == 0
    nobody = torch.zeros_like(sound)
    torch.testing.assert_close(run(gm, x, nobody)[0], model(x, nobody))


@pytest.mark.everyday(4)
@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: put(x, (m := x[:, 0] > 0), layer(x[m]).softmax(0)),
        lambda layer, x: put(x, (m := x[:, 0] > 0), layer(x[m]).flip(0)),
        lambda layer, x: put(x, x[:, 0] > 0, x[: T // 2]),
        lambda layer, x: put(x, (m := x[:, 0] > 0), layer(x[m]) + x[m.clone()]),
        lambda layer, x: x.index_add(0, (i := torch.where(x[:1, :4] > 0)[0]), layer(x[i])),
        lambda layer, x: x[:, None].index_put(((i := torch.where(x > 0)[0]), i * 0), layer(x[i]), accumulate=True),
        lambda layer, x: (y := torch.stack([x] * T)).index_put(
            ((i := torch.where(x[:, :1] > 0)[0]), i), layer(y[i, i]), accumulate=True
        ),
    ],
    ids=[
        *("softmax over rows", "another order", "other rows", "rows of another mask", "places of a mask of one row"),
        *("two axes", "a diagonal"),
    ],
)
def test_what_works_on_more_than_rows_stays(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    x = torch.cat([X.abs()[: T // 2], -X.abs()[T // 2 :]])
    assert declines(PickedRowsToAll, graph_of(Picks(function), x)) == []
