"""Norms of queries and keys by head become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.graph import aten, calls
from passes.ir import QUANTIZE
from passes.place.head_norms import JoinHeadNorms
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import insert

HEADS = [4, 2, 2]
WIDTH = 16


class Packed(nn.Module):
    """Heads of one tensor `[B,S,8,16]`, or `[B,8,S,16]`: normalized queries and keys, values, and one attention."""

    def __init__(self, *, transposed: bool = False, eps: float = 1e-6, weights: bool = True, returns: bool = False):
        super().__init__()
        self.transposed, self.eps, self.returns = transposed, eps, returns
        self.q = nn.Parameter(torch.rand(WIDTH) + 0.5) if weights else None
        self.k = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.transpose(1, 2) if self.transposed else x).split(HEADS, 1 if self.transposed else 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.transposed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.parts(x)
        norm = nn.functional.rms_norm
        y = self.attention(norm(q, (WIDTH,), self.q, 1e-6), norm(k, (WIDTH,), self.k, self.eps), v)
        return (y, v.sin()) if self.returns else y


def packed(module: nn.Module, dtype: torch.dtype = torch.float16, **options: Any) -> GraphModule:
    gm = graph_of(module.to(dtype), torch.randn(2, 5, 8, WIDTH, dtype=dtype), **options)
    insert(gm, {"q": torch.tensor(0.01), "k": torch.tensor(0.01), "v": torch.tensor(0.01)})
    return gm


@pytest.mark.everyday(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_norm_in_place_of_two(transposed: bool, dtype: torch.dtype, dynamic: bool) -> None:
    shapes = ({0: DYNAMIC, 1: DYNAMIC},) if dynamic else None
    gm = packed(Packed(transposed=transposed), dtype, dynamic_shapes=shapes)
    x = torch.randn(3 if dynamic else 2, 7 if dynamic else 5, 8, WIDTH, dtype=dtype)
    x[0, 0] *= 1e-4
    x[0, 1] = 0
    # a code of FP8 may be its neighbour, which the softmax sees
    rewrites(JoinHeadNorms, gm, x, rtol=0.05, atol=0.15 if dtype is torch.float16 else 0.3)
    assert (count(gm, aten.rms_norm.default), count(gm, aten.mean.dim)) == (0, 1)


class Cached(Packed):
    """The same, keys and values appended to what is given."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> Any:  # type: ignore[override]
        q, k, v = self.parts(x)
        norm = nn.functional.rms_norm
        q, k = norm(q, (WIDTH,), self.q, 1e-6), norm(k, (WIDTH,), self.k, 1e-6)
        keys, values = torch.cat([past_k, k.transpose(1, 2)], 2), torch.cat([past_v, v.transpose(1, 2)], 2)
        y = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, scale=1.0, enable_gqa=True)
        return y, keys, values


def test_values_may_be_appended_to_a_cache() -> None:
    past = torch.randn(2, 2, 3, WIDTH).half()
    inputs = torch.randn(2, 5, 8, WIDTH).half(), past, past + 1
    gm = graph_of(Cached().half(), *inputs)
    rewrites(JoinHeadNorms, gm, *inputs, rtol=2e-3, atol=1e-2)
    assert (count(gm, aten.rms_norm.default), count(gm, aten.mean.dim)) == (0, 1)


def quantized_values(gm: GraphModule, x: Tensor) -> list[Tensor]:
    """What the quantizers see."""
    output = gm.graph.output_node()
    output.args = (tuple(node.args[0] for node in calls(gm.graph, QUANTIZE)),)
    gm.graph.eliminate_dead_code()
    return run(gm, x)


def test_values_are_the_same_bits_and_the_others_but_for_one_rounding() -> None:
    """`rms_norm` of torch rounds behind the weight only."""
    x = torch.randn(2, 5, 8, WIDTH).half() * torch.logspace(-6, 4, 5)[:, None, None].half()
    torch.manual_seed(0)
    module = Packed()
    before, after = packed(module), packed(module)
    JoinHeadNorms()(after)
    q, k, v = quantized_values(before, x)
    for wanted, found in ((q, 0), (k, 1)):
        torch.testing.assert_close(quantized_values(after, x)[found], wanted, rtol=2e-3, atol=0)
    assert torch.equal(quantized_values(after, x)[2], v)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Packed(eps=1e-5), "add different numbers to the mean square"),
        (Packed(weights=False), "a weight of the norms of queries and keys is no constant"),
    ],
)
def test_what_differs_is_left(module: nn.Module, said: str) -> None:
    assert [said in reason for reason in declines(JoinHeadNorms, packed(module))] == [True]


@pytest.mark.parametrize(("module", "dtype"), [(Packed(returns=True), torch.float16), (Packed(), torch.float32)])
def test_what_costs_no_kernels_is_left(module: nn.Module, dtype: torch.dtype) -> None:
    gm = packed(module, dtype)
    assert declines(JoinHeadNorms, gm) == []
    assert count(gm, aten.rms_norm.default) == 2


def test_heads_that_are_taken_twice_are_left() -> None:
    gm = packed(Packed())
    (norm, _) = calls(gm.graph, aten.rms_norm.default)
    part, output = norm.args[0], gm.graph.output_node()
    assert isinstance(part, Node)
    with gm.graph.inserting_before(output):
        again = gm.graph.node_copy(part)
        other = gm.graph.node_copy(norm, lambda node: again if node is part else node)
    output.args = ((*output.args[0], other),)  # type: ignore[misc]
    gm.recompile()
    assert declines(JoinHeadNorms, gm) == []
