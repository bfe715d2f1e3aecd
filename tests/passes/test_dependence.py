"""Which inputs the values of a tensor depend on; what depends on none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from passes.dependence import fixed_nodes, input_dependence, metadata_operand, value_operands
from passes.graph import aten
from passes.testing import DYNAMIC, graph_of


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


FIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a weight": lambda x, w: w.sin(),
    "expanded to a size": lambda x, w: w.expand(x.shape[0], -1) + 1,
    "expanded as another": lambda x, w: w.expand_as(x).exp(),
    "the dtype of another": lambda x, w: w.type_as(x) * 2,
    "zeros of a size": lambda x, w: torch.zeros_like(x[:, :1]) + w,
    "new ones": lambda x, w: x.new_ones(3, 4) * w,
    "a number of elements": lambda x, w: w * x.numel(),
    "filled": lambda x, w: x.clone().fill_(3.0) + w,
    "an arange of a size": lambda x, w: torch.arange(x.shape[0]).float().unsqueeze(1) * w,
    "dropout that is off": lambda x, w: nn.functional.dropout(w, 0.5, training=False),
    "attention over weights": lambda x, w: nn.functional.scaled_dot_product_attention(w[None], w[None], w[None]),
    "a part of a split": lambda x, w: w.chunk(2, -1)[1].neg(),
}
REACHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a value": lambda x, w: w + x[:1],
    "zero times a value": lambda x, w: w + x[:1] * 0,
    "a mask": lambda x, w: w.masked_fill(x[:1] > 0, 0.0),
    "values put into zeros": lambda x, w: torch.zeros_like(x).index_copy(0, torch.tensor([1]), x[:1]),
    "where": lambda x, w: torch.where(x > 0, w, 0.0),
}


def last(function: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> tuple[bool, set[str]]:
    """Whether the result of `function` is fixed, and the inputs that it depends on."""
    sizes = ({0: DYNAMIC},) if dynamic else None
    gm = graph_of(Function(function), torch.randn(3, 4), dynamic_shapes=sizes)
    (result,) = gm.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    return result in fixed_nodes(gm), input_dependence(gm)[0]


@pytest.mark.everyday(4)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FIXED)
def test_sizes_are_no_values(name: str, dynamic: bool) -> None:
    assert last(FIXED[name], dynamic) == (True, set())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", REACHED)
def test_values_are(name: str, dynamic: bool) -> None:
    assert last(REACHED[name], dynamic) == (False, {"x"})


def test_what_is_drawn_is_not_fixed_and_depends_on_nothing() -> None:
    for draw in (lambda x, w: torch.rand_like(x) + w, lambda x, w: nn.functional.dropout(w, 0.5, training=True)):
        assert last(draw, False) == (False, set())


def test_a_number_read_off_a_tensor_is_a_value() -> None:
    gm = graph_of(Function(lambda x, w: w * x.sum().item()), torch.randn(3, 4))
    assert input_dependence(gm) == [{"x"}]
    assert not any(node.target is aten.mul.Tensor for node in fixed_nodes(gm))


def test_an_operand_that_is_read_twice_is_read() -> None:
    gm = graph_of(Function(lambda x, w: x.expand_as(x)), torch.randn(3, 4))
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is aten.expand_as.default:
            assert metadata_operand(node) is None and value_operands(node)
    assert input_dependence(gm) == [{"x"}]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_sums_of_flex_attention_need_no_values() -> None:
    """They are written out without these, and a pass that does so has cut nothing off."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        values, sums = flex_attention(q, k, v, return_lse=True)
        return values, sums

    gm = graph_of(both, *(torch.randn(1, 2, 8, 4) for _ in "qkv"))
    assert input_dependence(gm) == [{"q", "k", "v"}, {"q", "k"}]
