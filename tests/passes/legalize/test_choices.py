"""The scores that a token's experts are chosen by keep the model's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.graph import aten, calls, dtype
from passes.legalize.choices import choices
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.normalize.views import ViewsToReshape
from passes.testing import DYNAMIC, graph_of, only_call, run


class Router(nn.Module):
    """Scores of four experts, the best two of which scale the rows of `up`'s result."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.up = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        weights, chosen = scores.topk(2, dim=-1)
        return self.up(x).gather(-1, chosen) * weights / weights.sum(-1, keepdim=True)


class Sampler(nn.Module):
    """A head that returns which tokens are likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = self.head(x).topk(2)
        return values, indices


def test_a_router_stays_in_float32_and_the_rest_does_not() -> None:
    gm = graph_of(Router(), torch.randn(3, 8), dynamic_shapes=({0: DYNAMIC},))
    x = torch.randn(5, 8)
    (before,) = run(gm, x)
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    gate, up = calls(gm.graph, aten.linear.default)
    assert (dtype(gate), dtype(up)) == (torch.float32, torch.float16)
    assert dtype(only_call(gm, aten.sigmoid.default)) is torch.float32
    (after,) = run(gm, x)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
    assert not ConvertComputeDtype(torch.float32, torch.float16)(gm).modified


def test_equal_half_scores_are_told_apart() -> None:
    """Two experts whose float16 scores are equal: the one that float32 prefers is chosen."""
    module = Router()
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[:, 0] = torch.tensor([1.0, 1.00001, 1.00002, 0.0])
        module.up.weight.zero_()
        module.up.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    gm = graph_of(module, torch.ones(1, 8))
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    (got,) = run(gm, torch.ones(1, 8))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.5]]), rtol=1e-3, atol=1e-3)


def test_a_choice_that_is_only_returned_is_none() -> None:
    gm = graph_of(Sampler(), torch.randn(3, 8))
    assert choices(gm.graph) == set()
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    assert dtype(only_call(gm, aten.linear.default)) is torch.float16


def test_scores_that_are_reshaped_on_the_way_are_scores() -> None:
    class Flat(Router):
        def forward(self, x: Tensor) -> Tensor:
            chosen = self.gate(x).reshape(-1, 4).softmax(-1).topk(2)[1]
            return self.up(x).reshape(-1, 4).gather(-1, chosen)

    gm = graph_of(Flat(), torch.randn(2, 3, 8))
    ViewsToReshape()(gm)
    gate, _ = calls(gm.graph, aten.linear.default)
    assert gate in choices(gm.graph)


class Routers(Router):
    """Two choices by one router, and one by scores that come from outside."""

    def forward(self, x: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
        scores = self.gate(x).sigmoid()
        first, second, third = scores.topk(1)[1], scores.topk(2)[1], given.topk(1)[1]
        up = self.up(x)
        return up.gather(-1, first) + up.gather(-1, second) + up.gather(-1, third)


def test_choices_by_one_router_and_by_an_input() -> None:
    gm = graph_of(Routers(), torch.randn(3, 8), torch.randn(3, 4))
    gate, _ = calls(gm.graph, aten.linear.default)
    scores = only_call(gm, aten.sigmoid.default)
    assert choices(gm.graph) == {gate, scores, *calls(gm.graph, aten.topk.default)}
