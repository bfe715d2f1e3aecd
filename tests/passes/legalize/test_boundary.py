"""The program's inputs and outputs in another floating-point type: the numbers between them stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten, val
from passes.legalize.boundary import ConvertBoundary
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.normalize.noops import RemoveNoOps
from passes.testing import DYNAMIC, count, graph_of, run

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


class Mixed(nn.Module):
    """Readers of every kind: a layer, a size, an index, a graph in a call, nobody; an input that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        y = torch.cond(t.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))
        return self.linear(x)[ids], y + x.shape[0], t.to(torch.float16), x, ids


def dtypes(gm: GraphModule) -> tuple[list[torch.dtype], list[torch.dtype]]:
    (outputs,) = gm.graph.output_node().args
    inputs = gm.graph.find_nodes(op="placeholder")
    return [val(node).dtype for node in inputs], [val(node).dtype for node in outputs]  # type: ignore[union-attr]


@settings(max_examples=4, deadline=None)
@given(
    own=st.sampled_from(FLOATS),
    computing=st.sampled_from(FLOATS),
    target=st.sampled_from(FLOATS),
    dynamic=st.booleans(),
    special=st.sampled_from([0.0, 1e-30, 7e4, float("nan"), float("inf")]),
)
def test_the_numbers_between_stay(
    own: torch.dtype, computing: torch.dtype, target: torch.dtype, dynamic: bool, special: float
) -> None:
    x, t, ids, unused = torch.randn(3, 4), torch.rand(3), torch.tensor([2, 0]), torch.randn(3)
    x[0, 0] = special
    given = [x.to(own), t.to(own), ids, unused.to(own)]
    shapes = ({0: DYNAMIC}, {0: DYNAMIC}, None, None) if dynamic else None
    gm = graph_of(Mixed().to(own), *given, dynamic_shapes=shapes)
    RemoveNoOps()(gm)
    if own is not computing:
        ConvertComputeDtype(own, computing)(gm)
    rounded = [value.to(target).to(value.dtype) if value.is_floating_point() else value for value in given]
    expected = [value.to(target) if value.is_floating_point() else value for value in run(gm, *rounded)]
    ConvertBoundary(target)(gm)
    assert dtypes(gm)[0] == [target, target, torch.int64, target]
    assert dtypes(gm)[1] == [target, target, target, target, torch.int64]
    got = run(gm, *(value.to(target) if value.is_floating_point() else value for value in given))
    for result, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    assert not ConvertBoundary(target)(gm).modified


def test_casts_of_the_compute_dtype_go() -> None:
    gm = graph_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    casts = count(gm, aten._to_copy.default)
    log = ConvertBoundary(torch.float16)
    log(gm)
    assert count(gm, aten._to_copy.default) == casts - 2  # those of the weights are left to FoldConstants
    assert not log.log.notices


@pytest.mark.parametrize("target, told", [(torch.float16, True), (torch.bfloat16, False)])
def test_an_output_that_can_be_beyond_the_target_is_told(target: torch.dtype, told: bool) -> None:
    made = ConvertBoundary(target)
    made(graph_of(nn.Linear(4, 4), torch.randn(2, 4)))
    assert ["65504" in notice for notice in made.log.notices] == [True] * told
