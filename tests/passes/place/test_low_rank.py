"""A low-rank part beside a weight: the same product, what reads the weight otherwise keeps it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import run_pipeline
from passes.constants import constant
from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8
from passes.graph import aten, calls
from passes.normalize.views import ViewsToReshape
from passes.place.low_rank import LowRank, SplitLowRank, SplitProduct, is_low_rank
from passes.place.merge_linears import MergeParallelLinears
from passes.program import lift, unlift
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites, linear_name
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import Attention, export

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Shared(nn.Module):
    """Two layers read one tensor, a third is called twice, and an embedding reads the weight of a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.twice = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 12)
        self.head, self.table = nn.Linear(12, 5, bias=False), nn.Embedding(5, 12)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.twice(self.twice(self.q(x) * self.k(x)).sin())
        return self.head(y), self.table(torch.tensor([1, 3]))


def linears(gm: GraphModule) -> list[Node]:
    return [node for node in calls(gm.graph, aten.linear.default) if not is_low_rank(node)]


def part(rank: int, columns: int, *rows: int) -> LowRank:
    return LowRank(torch.randn(rank, columns), tuple(torch.randn(n, rank) for n in rows))


def split(gm: GraphModule) -> partial[SplitLowRank]:
    q, k, first, second, head = linears(gm)
    twice = part(2, 12, 12)
    return partial(
        SplitLowRank, {(q, k): part(3, 8, 12, 12), (first,): twice, (second,): twice, (head,): part(1, 12, 5)}
    )


def test_the_product_stays_and_factors_are_shared() -> None:
    gm = graph_of(Shared(), torch.randn(2, 8), dynamic_shapes=({0: DYNAMIC},))
    make, before, weight = split(gm), linears(gm), gm.get_parameter("table.weight")
    rewrites(make, gm, torch.randn(5, 8), fired=5, **CLOSE)
    assert linears(gm) == before  # the same nodes
    q, k, first, second, head = map(SplitProduct.read, before)
    assert q and k and first and second and head
    assert q.reduced is k.reduced and q.down.target == "q+k.svdquant_lora_a"
    assert first.reduced is not second.reduced and first.up.target == second.up.target == "twice.svdquant_lora_b"
    assert (q.bias, k.bias, len(before[0].args)) == (q.product.args[2], None, 2)
    assert [linear_name(node) for node in before] == ["q", "k", "twice", "twice", "table"]
    assert torch.equal(gm.get_parameter("table.weight"), weight)  # the embedding's
    rest = constant(gm, before[2].args[1])
    assert rest is not None and constant(gm, before[3].args[1]) is rest and rest is gm.get_parameter("twice.weight")


def test_a_program_that_was_lifted_is_read_alike() -> None:
    program = export(Shared(), torch.randn(2, 8))
    gm = unlift(program)
    split(gm)()(gm)
    found = [SplitProduct.read(node) for node in linears(unlift(lift(gm, program)))]
    assert [one is not None and str(one.up.target).rpartition(".")[2] for one in found] == ["svdquant_lora_b"] * 5


def test_what_was_left_is_listed_and_an_add_is_no_low_rank_part() -> None:
    gm = graph_of(Shared(), torch.randn(2, 8))
    first = linears(gm)[0]
    assert declines(lambda: SplitLowRank({}, {first: "it is small"}), gm) == ["it is small"]
    assert SplitProduct.read(first) is None
    gm = graph_of(
        lambda x, w, v: torch.nn.functional.linear(x, w) + torch.nn.functional.linear(x, v), *[torch.eye(3)] * 3
    )
    assert SplitProduct.read(linears(gm)[0]) is None


def quantized(module: nn.Module, x: Tensor, groups: list[tuple[int, ...]]) -> GraphModule:
    """`module` with low-rank parts of the linear layers of `groups`, and with all others in FP8."""
    gm = graph_of(module, x)
    ViewsToReshape()(gm)
    layers = linears(gm)
    rows, columns = layers[0].args[1].meta["val"].shape  # type: ignore[union-attr]
    parts = {tuple(layers[i] for i in group): part(2, columns, *[rows] * len(group)) for group in groups}
    scale = torch.tensor(0.02)
    sites = [site for site in find_sites(gm) if site.operand in ("input", "weight")]
    SplitLowRank(parts)(gm)
    run_pipeline((partial(InsertQdq, {site: Quantizer(FP8, scale) for site in sites}), FoldWeights), gm)
    return gm


def test_parallel_layers_with_low_rank_parts_become_one() -> None:
    module, x = nn.Sequential(Attention(2, 8)), torch.randn(2, 5, 16)
    gm = quantized(module, x, [(0, 1, 2)])
    rewrites(MergeParallelLinears, gm, x, **CLOSE)
    FoldConstants()(gm)
    (merged,) = linears(gm)
    found = SplitProduct.read(merged)
    assert found is not None and count(gm, aten.linear.default) == 3
    assert found.up.target == "0.q_proj+k_proj+v_proj.svdquant_lora_b" and found.up.meta["val"].shape == (48, 2)


def test_layers_whose_low_rank_parts_differ_are_not_merged() -> None:
    x = torch.randn(2, 5, 16)
    for groups in ([(0, 1)], [(0,), (1,), (2,)]):
        gm = quantized(nn.Sequential(Attention(2, 8)), x, groups)
        (before,) = run(gm, x)
        assert declines(MergeParallelLinears, gm) == ["their low-rank parts do not share the first factor"]
        assert torch.equal(run(gm, x)[0], before)
