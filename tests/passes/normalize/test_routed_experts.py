"""Experts that Transformers gathers or groups, against its own results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.base import run_pipeline
from passes.graph import aten
from passes.ir import BATCHED_LINEAR
from passes.normalize.noops import RemoveNoOps
from passes.normalize.routed_experts import RoutedExpertsToDense
from passes.normalize.views import ViewsToReshape
from passes.pipelines import NORMALIZE
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """The MLP of a decoder, without what its router returns beside it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y[0] if isinstance(y, tuple) else y


def block(name: str, implementation: str) -> Block:
    small: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 10, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**small)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.set_experts_implementation(implementation)
    return Block(model.layers[0].mlp)


def normalized(module: nn.Module, x: Tensor, **options: Any) -> GraphModule:
    gm = graph_of(module, x, **options)
    run_pipeline((ViewsToReshape, RemoveNoOps), gm)
    return gm


@pytest.mark.everyday(1)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_becomes_dense(name: str, implementation: str, dynamic: bool) -> None:
    shapes = ({0: DYNAMIC, 1: DYNAMIC},) if dynamic else None
    gm = normalized(block(name, implementation), X, dynamic_shapes=shapes)
    log = rewrites(RoutedExpertsToDense, gm, torch.randn(3, 7, 16) if dynamic else X, **TOLERANCE)
    assert not log.declined and count(gm, BATCHED_LINEAR) == 2
    assert count(gm, aten.bmm.default, aten.sort.default, aten.repeat_interleave.self_int) == 0


@pytest.mark.parametrize("arguments", [(-1, True), (0, True)])
def test_rows_that_are_sorted_backwards_are_not_the_groups(arguments: tuple[int, bool]) -> None:
    gm = normalized(block("Mixtral", "grouped_mm"), X)
    sort = only_call(gm, aten.sort.default)
    sort.args = (sort.args[0], *arguments)
    gm.recompile()
    reasons = declines(RoutedExpertsToDense, gm)
    assert len(reasons) == 2 and all("cannot be made dense" in reason for reason in reasons)


class Gathered(nn.Module):
    """As "batched_mm" writes it, with one thing changed."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = x.repeat(2, 1) if self.change == "other rows" else x.repeat_interleave(2, 0)
        if self.change == "repeated once":
            rows = torch.cat([x, x]).repeat_interleave(1, 0)
        ids = index.reshape(-1)
        others = (3 - index).reshape(-1) if self.change == "other experts" else ids
        hidden = torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1)
        hidden = hidden.cumsum(0) if self.change == "mixes rows" else hidden.relu()
        if self.change == "reads the rows":
            hidden = hidden * rows[:, :1]
        result = torch.bmm(self.down[others], hidden.unsqueeze(-1)).squeeze(-1)
        if self.change != "no weights":
            result = result * weights.reshape(-1).unsqueeze(-1)
        result = result.view(-1, 2, 16)
        return result.amax(1) if self.change == "largest" else result.sum(1)


ROUTED = (torch.randn(5, 16), torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [2, 1]]), torch.rand(5, 2))


def test_an_expert_that_is_chosen_twice_counts_twice() -> None:
    gm = graph_of(Gathered("nothing"), *ROUTED)
    run_pipeline((ViewsToReshape, RemoveNoOps), gm)
    rewrites(RoutedExpertsToDense, gm, *ROUTED, rtol=1e-4, atol=1e-4)


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "change",
    ["other rows", "repeated once", "other experts", "mixes rows", "reads the rows", "no weights", "largest"],
)
def test_declines_what_is_another_mixture(change: str) -> None:
    gm = graph_of(Gathered(change), *ROUTED)
    run_pipeline((ViewsToReshape, RemoveNoOps), gm)
    reasons = declines(RoutedExpertsToDense, gm)
    assert len(reasons) == 2 and all("cannot be made dense" in reason for reason in reasons)


def test_an_expert_that_overflows_on_a_token_of_another_does_no_harm() -> None:
    module = Gathered("nothing").half()
    with torch.no_grad():
        module.up[0] = 1e4
        module.down[0] = 1e4
    x, index, weights = ROUTED[0].half().abs() + 1, ROUTED[1].clamp(min=1), ROUTED[2].half()
    gm = graph_of(copy.deepcopy(module), x, index, weights)
    run_pipeline(NORMALIZE, gm)
    assert count(gm, BATCHED_LINEAR) == 2
    with torch.no_grad():
        assert torch.isfinite(gm(x, index, weights)[0]).all()
