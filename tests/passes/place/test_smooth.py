"""Factors into norms and layers: the same products, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.absorb import Absorber, find_absorber
from passes.constants import add_constant, constant
from passes.graph import aten, calls, dtype
from passes.place.rotate import RotateLinears
from passes.place.smooth import EDITED, Smoothing, SmoothLinears
from passes.program import lift, unlift
from passes.subgraphs import copied_graph
from passes.testing import count, declines, graph_of, graph_text, returns, rewrites, run
from tests.passes.support import export

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def linears(gm: GraphModule) -> list[Node]:
    return list(calls(gm.graph, aten.linear.default))


def factor(size: int, seed: int = 0) -> Tensor:
    return torch.exp2(torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2).bfloat16().float()


def smoothing(gm: GraphModule, *groups: tuple[int, ...]) -> Callable[[], SmoothLinears]:
    """Of the linear layers with these indices, each with another factor."""
    nodes = linears(gm)
    made = []
    for index, group in enumerate(groups):
        chosen = tuple(nodes[i] for i in group)
        made.append(Smoothing(chosen, factor(chosen[0].args[1].meta["val"].shape[1], index)))  # type: ignore[union-attr]
    return lambda: SmoothLinears(made)


class Norms(nn.Module):
    """Both norms, of which all readers are layers; the second has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        nn.init.normal_(self.first.weight)
        nn.init.normal_(self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.v(self.second(self.q(y) * self.k(y)))


def test_a_norm_takes_the_factor_of_all_its_readers() -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Norms(), x)
    weight = gm.get_parameter("first.weight").detach().clone()
    rewrites(smoothing(gm, (0, 1), (2,)), gm, x, fired=2, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 1  # the model's own
    torch.testing.assert_close(gm.get_parameter("first.weight"), weight * factor(8))
    assert sorted(gm.state_dict()) == sorted(Norms().state_dict())
    assert sum(bool(n.meta.get("custom", {}).get(EDITED)) for n in gm.graph.nodes) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_where_something_else_reads_it_it_is_multiplied(dynamic: bool) -> None:
    x = torch.randn(2, 3, 8)
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) if dynamic else None
    gm = graph_of(Norms(), x, dynamic_shapes=shapes)
    rewrites(smoothing(gm, (0,), (2,)), gm, x, fired=2, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 2
    assert torch.equal(gm.get_buffer("q.pre_quant_scale"), factor(8))
    q, k, _ = linears(gm)
    assert q.args[0] is not k.args[0]


@pytest.mark.parametrize("groups", [((0, 1), (2,)), ((1,),)])
def test_every_other_reader_of_a_tensor_in_between_keeps_its_numbers(groups: tuple[tuple[int, ...], ...]) -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Norms(), x)
    for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
        copies: dict[Node, Node] = {}
        shared = copied_graph(gm, copies)
        returns(shared, *(copies[result] for result in gm.graph.output_node().args[0]), copies[node])  # type: ignore[union-attr,index]
        rewrites(smoothing(shared, *groups), shared, x, fired=len(groups), **CLOSE)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Relu(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.activation = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)).reshape(-1, 16))


def test_the_layer_before_takes_it_where_nothing_in_between_bends_it() -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Gated(), x)
    gate = gm.get_parameter("gate.weight")
    rewrites(smoothing(gm, (2,)), gm, x, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 1 and gm.get_parameter("gate.weight") is gate
    gm = graph_of(Relu(), x, normalized=True)
    rewrites(smoothing(gm, (1,)), gm, x, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 0
    gm = graph_of(Relu(nn.functional.gelu), x, normalized=True)
    rewrites(smoothing(gm, (1,)), gm, x, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 1


class Grouped(nn.Module):
    """Four heads of queries, two of keys and values."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, n) for n in (16, 8, 8, 8))
        self.o = nn.Linear(16, 8)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 3, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(2, 3, 16)
        return self.o(y) + (v.sum() if self.other else 0)


def heads(kept: int, repeats: int) -> Tensor:
    """A factor that the heads of one key/value head share."""
    return factor(kept * 4).view(kept, 1, 4).expand(kept, repeats, 4).flatten()


def test_values_take_the_factor_of_what_reads_the_attention() -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Grouped(), x, normalized=True)
    last = linears(gm)[-1]
    found = find_absorber(last.args[0], [last])  # type: ignore[arg-type]
    assert isinstance(found, Absorber) and (found.repeats, found.width, found.node) == (2, 4, linears(gm)[2])
    rewrites(lambda: SmoothLinears([Smoothing((last,), heads(2, 2))]), gm, x, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 0
    gm = graph_of(Grouped(other=True), x, normalized=True)
    last = linears(gm)[-1]
    assert find_absorber(last.args[0], [last]) == "reshape makes it"  # type: ignore[arg-type]


class Tied(nn.Module):
    """Two layers and an embedding have one weight, and two norms, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.again = nn.Embedding(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.again.weight = self.norm.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        first = nn.functional.linear(self.norm(x), self.embed.weight)
        return x, first, nn.functional.linear(self.again(x.sin()), self.embed.weight), self.again(x)


def test_shared_parameters_keep_their_numbers_for_others() -> None:
    ids = torch.arange(5)
    gm = graph_of(Tied(), ids)
    embedded, _, third, again = run(gm, ids)
    rewrites(smoothing(gm, (0,)), gm, ids, **CLOSE)
    for found, before in zip((run(gm, ids)[i] for i in (0, 2, 3)), (embedded, third, again), strict=True):
        assert torch.equal(found, before)


def test_parameters_keep_their_dtypes_and_a_program_is_saved_with_them() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    program = export(Norms().bfloat16(), x)
    gm = unlift(program)
    rewrites(smoothing(gm, (0,), (2,)), gm, x, fired=2, rtol=0.05, atol=0.05)
    assert {dtype(n) for n in gm.graph.find_nodes(op="get_attr")} == {torch.bfloat16}
    lifted = lift(gm, program)
    torch.testing.assert_close(lifted.module()(x), program.module()(x), rtol=0.05, atol=0.05)
    assert "q.pre_quant_scale" in lifted.state_dict


def test_what_it_declines() -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Relu(), x)
    rewrites(smoothing(gm, (1,)), gm, x, **CLOSE)
    assert declines(smoothing(gm, (1,)), gm, x, reason="smoothed already")
    gm = graph_of(nn.Linear(8, 4), x)
    RotateLinears(linears(gm))(gm)
    text = graph_text(gm)
    assert declines(smoothing(gm, (0,)), gm, x, reason="rotated") and graph_text(gm) == text
    gm = graph_of(nn.Linear(8, 4), x)
    (node,) = linears(gm)
    node.update_arg(0, add_constant(gm, "fixed", x, node))
    assert declines(smoothing(gm, (0,)), gm, x, reason="input is a constant")
    gm = graph_of(lambda x, w: nn.functional.linear(x, w), x, torch.randn(4, 8))
    (node,) = linears(gm)
    make = lambda: SmoothLinears([Smoothing((node,), factor(8))], {node: "said elsewhere"})  # noqa: E731
    assert declines(make, gm, x, torch.randn(4, 8), reason="computed when") == [
        "said elsewhere",
        "its weight is computed when the model runs",
    ]


def test_a_dead_constant_is_gone() -> None:
    x = torch.randn(2, 3, 8)
    gm = graph_of(Relu(), x, normalized=True)
    rewrites(smoothing(gm, (1,)), gm, x, **CLOSE)
    assert sorted(gm.state_dict()) == ["fc1.bias", "fc1.weight", "fc2.weight"]
    assert all(constant(gm, node) is not None for node in gm.graph.find_nodes(op="get_attr"))
