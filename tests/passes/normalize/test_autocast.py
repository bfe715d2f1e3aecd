"""The casts that autocast makes, against torch's own autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from passes.errors import PassError
from passes.graph import Emitter, aten, calls, module_path
from passes.normalize.autocast import MaterializeAutocast
from passes.testing import blank, count, declines, returns, run

HALF = torch.bfloat16


def recorded(node: Node, dtype: torch.dtype = HALF) -> Node:
    """`node` with the dtype that a trace under autocast notes for it."""
    node.meta["val"] = node.meta["val"].to(dtype)
    return node


def linear(emit: Emitter, *operands: Node) -> Node:
    return recorded(emit(aten.linear.default, *operands))


def test_a_graph_computes_what_autocast_did() -> None:
    x, first, second, goal = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(3, 5).to(HALF)

    def forward(x: Tensor, first: Tensor, second: Tensor, goal: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, first)
        return y, F.linear(x, second), F.mse_loss(y, goal)  # the loss in float32

    gm, emit, nodes = blank(x, first, second, goal)
    y = linear(emit, nodes[0], nodes[1])
    loss = recorded(emit(aten.mse_loss.default, y, nodes[3]), torch.float32)
    returns(gm, y, linear(emit, nodes[0], nodes[2]), loss)
    with torch.autocast("cpu", HALF):
        expected = forward(x, first, second, goal)
    instance = MaterializeAutocast()
    assert instance(gm).modified and instance.log.fired[instance.name] == 3
    torch.testing.assert_close(run(gm, x, first, second, goal), list(expected), rtol=0, atol=0)
    assert count(gm, aten._to_copy.default) == 5  # x once for both of its readers, two weights, what the loss reads
    declines(MaterializeAutocast, gm)


def test_a_cast_stands_behind_what_it_casts_and_belongs_to_its_module() -> None:
    gm, emit, (x, w) = blank(torch.randn(3, 4), torch.randn(4, 4))
    y = emit(aten.relu.default, x)
    y.meta["nn_module_stack"] = {"act": ("act", torch.nn.ReLU)}
    between = emit(aten.neg.default, x)
    returns(gm, linear(emit, y, w), between)
    MaterializeAutocast()(gm)
    _, cast = calls(gm.graph, aten._to_copy.default)
    assert cast.args == (y,) and y.next is cast and module_path(cast) == "act"


def test_what_autocast_does_not_cast_stays() -> None:
    table, ids = torch.randn(7, 4), torch.tensor([1, 5])
    gm, emit, (weight, index, double) = blank(table, ids, torch.randn(2, dtype=torch.float64))
    rows = recorded(emit(aten.embedding.default, weight, index))
    parts = emit(aten.split.Tensor, weight, 4)
    ones = recorded(emit(aten.ones.default, [2]))  # of no operand
    returns(gm, rows, emit.getitem(parts, 0), ones, emit(aten.neg.default, double), emit(aten.argmax.default, weight))
    MaterializeAutocast()(gm)
    (cast,) = calls(gm.graph, aten._to_copy.default)
    assert cast.args == (weight,) and rows.args == (cast, index)


def test_a_dtype_that_no_cast_explains_is_an_error() -> None:
    gm, emit, (x,) = blank(torch.randn(3))
    y = recorded(emit(aten._to_copy.default, x, dtype=torch.float32))
    y.meta["nn_module_stack"] = {"layers.3": ("layers.3", torch.nn.Module)}
    returns(gm, y)
    with pytest.raises(PassError, match=r"^layers.3: autocast made torch.bfloat16 of aten._to_copy.default, which no"):
        MaterializeAutocast()(gm)
