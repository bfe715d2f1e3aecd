from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from passes.graph import aten
from passes.normalize.noops import RemoveNoOps
from passes.normalize.views import ViewsToReshape
from passes.testing import DYNAMIC, blank, count, declines, graph_of, returns, rewrites, run


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "alias": lambda x: aten.alias.default(x),
    "detach": lambda x: x.detach(),
    "lift_fresh_copy": lambda x: aten.lift_fresh_copy.default(x),
    "to_copy": lambda x: aten._to_copy.default(x, dtype=torch.float32),
    "expand": lambda x: aten.expand.default(x, [2, 3, 4]),
    "view": lambda x: aten.view.default(x, [2, 3, 4]),
    "squeeze": lambda x: aten.squeeze.dim(x, 1),
    "slice": lambda x: aten.slice.Tensor(x, 1, 0, 2**63 - 1),
    "transpose": lambda x: aten.transpose.int(x, -1, 2),
    "permute": lambda x: aten.permute.default(x, [0, 1, 2]),
    "mul": lambda x: aten.mul.Tensor(x, 1.0),
    "div": lambda x: aten.div.Tensor(x, 1),
    "add": lambda x: aten.add.Tensor(x, 0),
    "sub": lambda x: aten.sub.Tensor(x, 0.0),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("name", NO_OPS)
def test_removes(name: str) -> None:
    x = torch.randn(2, 3, 4)
    gm = graph_of(Apply(lambda x: NO_OPS[name](x.relu()).neg()), x)
    before = len(gm.graph.nodes)
    if before == 4:
        pytest.skip("export does not keep this operator")
    rewrites(RemoveNoOps, gm, x, fired=before - 4)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.relu.default, aten.neg.default]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda x: x * 2.0,
    "add": lambda x: x + 1,
    "sub_from_zero": lambda x: 0 - x,
    "promotion": lambda x: x.argmax(-1) * 1.0,
    "cast": lambda x: aten._to_copy.default(x, dtype=torch.float16),
    "part": lambda x: x[:, 1:],
    "stride": lambda x: x[:, ::2],
    "flip_axes": lambda x: x.transpose(1, 2),
    "square_transpose": lambda x: x[:, :, :3].transpose(1, 2),
    "expand": lambda x: x[:, :1].expand(2, 3, 4),
}


@pytest.mark.everyday(2)
@pytest.mark.parametrize("name", OPERATIONS)
def test_keeps_what_does_something(name: str) -> None:
    gm = graph_of(Apply(lambda x: OPERATIONS[name](x.relu()).neg()), torch.randn(2, 3, 4))
    ViewsToReshape()(gm)
    assert declines(RemoveNoOps, gm) == []


def test_assertions_about_metadata() -> None:
    x = torch.randn(2, 3)
    gm = graph_of(Apply(lambda x: x.relu().to(torch.float32).half()), x)
    assert count(gm, aten._assert_tensor_metadata.default) > 0
    rewrites(RemoveNoOps, gm, x, fired=count(gm, aten._assert_tensor_metadata.default))
    FileCheck().check_not("_assert_tensor_metadata").check("relu").check("_to_copy").run(gm.code)


def test_copy_of_an_input_stays_an_output() -> None:
    x = torch.randn(3)
    gm = graph_of(Apply(lambda x: x.clone()), x)
    assert declines(RemoveNoOps, gm) == [
        "a graph output would share its storage with an input, a weight or another output"
    ]
    (out,) = run(gm, x)
    assert out.data_ptr() != x.data_ptr()


def test_copy_of_another_output_stays_but_not_for_other_users() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.relu()
        z = y.clone()
        return y, z, z.neg()

    x = torch.randn(3)
    gm = graph_of(Apply(forward), x)
    log = rewrites(RemoveNoOps, gm, x)
    assert len(log.declined) == 1
    first, second, _ = run(gm, x)
    assert first.data_ptr() != second.data_ptr()
    FileCheck().check("neg.default(relu)").run(gm.code)


def test_copy_of_a_view_of_an_input_stays_an_output() -> None:
    gm = graph_of(Apply(lambda x: x.transpose(0, 1).clone()), torch.randn(3, 4))
    assert len(declines(RemoveNoOps, gm)) == 1


def test_output_of_its_own_loses_its_copy() -> None:
    x = torch.randn(3)
    gm = graph_of(Apply(lambda x: x.relu().clone()), x)
    rewrites(RemoveNoOps, gm, x)
    assert count(gm, aten.clone.default) == 0


def test_layout_copy_stays_while_a_view_needs_it() -> None:
    x = torch.randn(2, 3, 4)
    gm = graph_of(Apply(lambda x: x.relu().transpose(1, 2).reshape(2, 12)), x)
    assert declines(RemoveNoOps, gm) == []
    ViewsToReshape()(gm)
    rewrites(RemoveNoOps, gm, x)
    FileCheck().check_not("clone").check("reshape").run(gm.code)


def test_layout_of_an_output_stays() -> None:
    gm = graph_of(Apply(lambda x: x.relu().transpose(0, 1).contiguous()), torch.randn(3, 4))
    assert declines(RemoveNoOps, gm) == []
    assert run(gm, torch.randn(3, 4))[0].is_contiguous()


def test_dynamic_slice_over_the_whole_axis() -> None:
    x = torch.randn(3, 4)
    module = Apply(lambda x: aten.slice.Tensor(x.relu(), 0, 0, 2**63 - 1).neg())
    gm = graph_of(module, x, dynamic_shapes=(({0: DYNAMIC},),))
    rewrites(RemoveNoOps, gm, x, fired=count(gm, aten.slice.Tensor))
    torch.testing.assert_close(run(gm, torch.ones(5, 4))[0], -torch.ones(5, 4))


def test_padding_by_nothing_and_a_cast_to_the_same_type_go() -> None:
    x = torch.randn(3, 4)
    gm = graph_of(Apply(lambda x: nn.functional.pad(x.relu(), (0, 0, 0, 0)).type_as(x).neg()), x)
    assert count(gm, aten.pad.default, aten.constant_pad_nd.default, aten.type_as.default) == 2
    rewrites(RemoveNoOps, gm, x, fired=2)
    moved = graph_of(Apply(lambda x: nn.functional.pad(x.relu(), (1, -1)).neg()), x)
    assert declines(RemoveNoOps, moved) == []


@pytest.mark.parametrize(("share", "training", "goes"), [(0.5, False, True), (0.0, True, True), (0.5, True, False)])
def test_dropout_goes_where_it_drops_nothing(share: float, training: bool, goes: bool) -> None:
    gm, emit, (x,) = blank(torch.randn(3))
    dropped = emit(aten.dropout.default, emit(aten.relu.default, x), share, training)
    returns(gm, emit(aten.neg.default, dropped))
    assert RemoveNoOps()(gm).modified == goes
    assert count(gm, aten.dropout.default) == (not goes)
