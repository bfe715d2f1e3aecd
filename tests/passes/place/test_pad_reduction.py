"""A reduction axis filled up to whole blocks: the same product, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.constants import evaluate_constant, is_constant_expression
from passes.graph import aten, calls, is_call, shape
from passes.ir import BATCHED_LINEAR
from passes.place.pad_reduction import PadReduction, padding
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run

PAD = aten.constant_pad_nd.default
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def padding_all(gm: GraphModule) -> PadReduction:
    return PadReduction(dict.fromkeys(calls(gm.graph, aten.linear.default, BATCHED_LINEAR), 16))


@given(
    width=st.integers(57, 200),
    lead=st.lists(st.integers(1, 3), max_size=3),
    dynamic=st.booleans(),
    bias=st.booleans(),
)
def test_the_product_stays(width: int, lead: list[int], dynamic: bool, bias: bool) -> None:
    shapes = ({axis: DYNAMIC for axis in range(len(lead))},) if dynamic else None
    model = nn.Linear(width, 3, bias=bias)
    gm = graph_of(model, torch.randn(*(size + 1 for size in lead), width), dynamic_shapes=shapes)
    x = torch.randn(*(size + 1 + dynamic for size in lead), width)
    node, extra = only_call(gm, aten.linear.default), padding(width, 16)
    if not extra:
        padding_all(gm)(gm)
        assert not count(gm, PAD)
        return
    rewrites(lambda: padding_all(gm), gm, x, **CLOSE)
    assert only_call(gm, aten.linear.default) is node
    assert [shape(operand)[-1] for operand in node.args[:2]] == [width + extra] * 2


def test_zeros_are_added_where_they_are_few() -> None:
    assert {size: padding(size, 16) for size in (16, 24, 72, 100, 127, 112, 682, 2730)} == {
        **dict.fromkeys((16, 24, 112), 0),
        **{72: 8, 100: 12, 127: 1, 682: 6, 2730: 6},
    }
    assert padding(8, 16) == padding(104, 128) == 0 and padding(130, 16) == 14


class Shared(nn.Module):
    """Two layers read one tensor, and so does the result; the second has the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(100, 4), nn.Linear(100, 4), nn.Linear(64, 100)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.b(x), self.c(x[..., :64]), x


def test_readers_of_one_tensor_share_its_padding() -> None:
    x = torch.randn(3, 100)
    gm = graph_of(Shared(), x)
    rewrites(lambda: padding_all(gm), gm, x, fired=2, **CLOSE)
    assert count(gm, PAD) == 2
    assert torch.equal(run(gm, x)[3], x)
    pads = list(calls(gm.graph, PAD))
    assert {tuple(pad.args[1]) for pad in pads} == {(0, 12)}


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.start = nn.Linear(100, 4), nn.Parameter(torch.randn(1, 100))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.start) + x
        return result


def test_a_constant_input_and_a_layer_that_nobody_chose_stay() -> None:
    gm = graph_of(Constant(), torch.randn(3, 4))
    assert declines(lambda: padding_all(gm), gm) == []
    gm = graph_of(Shared(), torch.randn(3, 100))
    assert declines(lambda: PadReduction({}), gm) == []


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 0.0, 1e30])
def test_special_values_go_through(special: float) -> None:
    x = torch.randn(3, 100)
    x[1, 7] = special
    gm = graph_of(nn.Linear(100, 4), x)
    rewrites(lambda: padding_all(gm), gm, x, **CLOSE)


def test_a_padded_weight_is_a_constant_expression() -> None:
    gm = graph_of(nn.Linear(100, 4), torch.randn(3, 100))
    padding_all(gm)(gm)
    weight = only_call(gm, aten.linear.default).args[1]
    assert isinstance(weight, Node) and is_call(weight, PAD) and is_constant_expression(weight)
    value = evaluate_constant(gm, weight)
    assert value.shape == (4, 112) and not value[:, 100:].any()


def test_an_empty_batch() -> None:
    gm = graph_of(nn.Linear(100, 4), torch.randn(3, 100), dynamic_shapes=({0: DYNAMIC},))
    rewrites(lambda: padding_all(gm), gm, torch.randn(0, 100))
