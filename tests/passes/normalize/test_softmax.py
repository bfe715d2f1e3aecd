from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten
from passes.normalize.softmax import NormalizeSoftmax
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.function(x, v)


def by_sum(x: Tensor, v: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1, keepdim=True) @ v


def less_the_largest(x: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)) @ v


def less_the_largest_of_all(x: Tensor, v: Tensor) -> Tensor:
    e = (x - x.max()).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def by_max_and_reciprocal(x: Tensor, v: Tensor) -> Tensor:
    e = (x - x.max(-1, keepdim=True)[0].detach()).exp()
    return (e * e.sum(-1, True).reciprocal()) @ v


def divided_behind_the_product(x: Tensor, v: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def over_columns(x: Tensor, v: Tensor) -> Tensor:
    e = (x - x.amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)) @ v


def by_logsumexp(x: Tensor, v: Tensor) -> Tensor:
    return (x - x.logsumexp(-1, keepdim=True)).exp() @ v


def by_log_softmax(x: Tensor, v: Tensor) -> Tensor:
    return x.log_softmax(-1).exp() @ v


def softmax_less_the_largest(x: Tensor, v: Tensor) -> Tensor:
    return (x - x.max(-1, keepdim=True).values).softmax(-1) @ v


WRITTEN = (
    softmax_less_the_largest,
    by_sum,
    less_the_largest,
    less_the_largest_of_all,
    by_max_and_reciprocal,
    divided_behind_the_product,
    over_columns,
    by_logsumexp,
    by_log_softmax,
)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("form", WRITTEN)
def test_fires(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = torch.randn(2, 5, 7), torch.randn(2, 7, 4)
    dynamic = ({0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}) if form is by_logsumexp else None
    gm = graph_of(Written(form), *inputs, dynamic_shapes=dynamic)
    rewrites(NormalizeSoftmax, gm, *inputs, **CLOSE)
    node = only_call(gm, aten.softmax.int)
    assert node.args[0] is gm.graph.find_nodes(op="placeholder")[0]
    assert node.args[1] in ((1,) if form is over_columns else (-1, 2))
    assert count(gm, aten.exp.default, aten.sum.dim_IntList) == 0


def no_keepdim(x: Tensor, v: Tensor) -> Tensor:
    e = x.exp()
    return (e / e.sum(1)[:, None]) @ v  # of the rows, divided along the columns


def another_summand(x: Tensor, v: Tensor) -> Tensor:
    e = x.exp()
    return (e / (e.sum(-1, keepdim=True) + 1)) @ v


def another_user(x: Tensor, v: Tensor) -> Tensor:
    e = x.exp()
    return (e / e.sum(-1, keepdim=True)) @ v + e.amax()


def the_product_is_read_twice(x: Tensor, v: Tensor) -> Tensor:
    e = x.exp()
    product = e @ v
    return product / e.sum(-1, keepdim=True) + product


def a_vector_of_values(x: Tensor, v: Tensor) -> Tensor:
    """The quotient of `[7]` and `[7, 1]` is a matrix."""
    e = x[0].exp()
    return (e @ v[0, :, 0]) / e.sum(-1, keepdim=True)


def a_softmax_of_a_number(x: Tensor, v: Tensor) -> Tensor:
    return (x.sum() - v.sum()).softmax(0) + v


def a_number(x: Tensor, v: Tensor) -> Tensor:
    e = x.sum().exp()
    return e / e.sum(0, keepdim=True) + v


@pytest.mark.everyday(7)
@pytest.mark.parametrize(
    "form",
    [
        no_keepdim,
        another_summand,
        another_user,
        the_product_is_read_twice,
        a_vector_of_values,
        a_number,
        a_softmax_of_a_number,
    ],
)
def test_leaves_what_is_no_softmax(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert declines(NormalizeSoftmax, graph_of(Written(form), torch.randn(2, 7, 7), torch.randn(2, 7, 4))) == []


def test_a_softmax_of_less_than_something_that_varies_stays() -> None:
    biased = lambda x, v: (x - v[:, None, :, 0]).softmax(-1) @ v  # noqa: E731
    assert declines(NormalizeSoftmax, graph_of(Written(biased), torch.randn(2, 5, 7), torch.randn(2, 7, 4))) == []


def test_keeps_what_varies_along_the_axis() -> None:
    def biased(x: Tensor, v: Tensor) -> Tensor:
        e = (x - v[:, None, :, 0]).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    inputs = torch.randn(2, 5, 7), torch.randn(2, 7, 4)
    gm = graph_of(Written(biased), *inputs)
    rewrites(NormalizeSoftmax, gm, *inputs, **CLOSE)
    assert count(gm, aten.sub.Tensor) == 1
