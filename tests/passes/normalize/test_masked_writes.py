"""Writes where a mask is true: features of images between the tokens of a text, and their like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten
from passes.normalize.masked_writes import MaskedWritesToWhere
from passes.testing import DYNAMIC, blank, count, declines, graph_of, returns, rewrites, run

IDS = torch.tensor([[1, 4, 4, 2], [4, 3, 3, 4]])
HIDDEN, FEATURES = torch.randn(2, 4, 6), torch.randn(4, 6)
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


class Merge(nn.Module):
    """`write(hidden, ids == 4, features)`."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    def forward(self, h: Tensor, ids: Tensor, features: Tensor) -> Tensor:
        return self.write(h.clone(), ids == 4, features)


def put(h: Tensor, index: object, values: object) -> Tensor:
    h[index] = values
    return h


WRITES: dict[str, Write] = {
    "masked_scatter": lambda h, m, f: h.masked_scatter(m.unsqueeze(-1).expand_as(h), f),
    "masked_scatter, broadcast": lambda h, m, f: h.masked_scatter(m[..., None], f.reshape(2, 2, 6)),
    "masked_scatter of elements": lambda h, m, f: h.masked_scatter(m[..., None] & (h > 0), f),
    "masked_scatter, more rows": lambda h, m, f: h.masked_scatter(m[..., None], torch.cat([f, f])),
    "mask": lambda h, m, f: put(h, m, f),
    "where": lambda h, m, f: put(h, torch.where(m), f),
    "where of numbers": lambda h, m, f: put(h, torch.where(m.long() * 3), f),
    "nonzero": lambda h, m, f: put(h, torch.nonzero(m, as_tuple=True), f),
    "columns of nonzero": lambda h, m, f: put(h, (m.nonzero()[:, 0], m.nonzero()[:, 1]), f),
    "unbind": lambda h, m, f: put(h, m.nonzero().unbind(-1), f),
    "flat": lambda h, m, f: put(h.view(-1, 6), m.flatten().nonzero().squeeze(-1), f),
    "index_copy": lambda h, m, f: h.view(-1, 6).index_copy(0, m.flatten().nonzero().view(-1), f),
    "a number": lambda h, m, f: put(h, m, 0.5),
    "one row for all": lambda h, m, f: put(h, m, f[0]),
    "one row for all, with an axis": lambda h, m, f: put(h, m, f[:1]),
    "columns that broadcast": lambda h, m, f: put(h, m, f[:, :1]),
    "numbers": lambda h, m, f: put(h[..., 0].clone(), m, f[:, 0]),
    "counted from the end": lambda h, m, f: put(h, (m.nonzero()[:, 0], m.nonzero()[:, -1]), f),
    "masked_scatter, the tensor broadcasts": lambda h, m, f: h[:1].masked_scatter(m[..., None], f),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_become_a_choice(write: Write) -> None:
    model = Merge(write)
    gm = graph_of(model, HIDDEN, IDS, FEATURES)
    if not count(gm, aten.masked_fill.Scalar):  # as torch 2.15 captures the write of a number
        rewrites(MaskedWritesToWhere, gm, HIDDEN, IDS, FEATURES)
    assert count(gm, aten.index_put.default, aten.masked_scatter.default, aten.index_copy.default) == 0
    others = (torch.randn(2, 4, 6), torch.tensor([[4, 4, 2, 2], [1, 4, 3, 4]]), torch.randn(4, 6))
    torch.testing.assert_close(run(gm, *others)[0], model(*others), rtol=0, atol=0)


def test_dynamic_sizes_and_no_rows_at_all() -> None:
    model = Merge(WRITES["masked_scatter"])
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})
    gm = graph_of(model, HIDDEN, IDS, FEATURES, dynamic_shapes=shapes)
    rewrites(MaskedWritesToWhere, gm, HIDDEN, IDS, FEATURES)
    h, ids = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.int64)
    assert torch.equal(run(gm, h, ids, torch.zeros(0, 6))[0], h)


def scattered(*, exact: bool) -> GraphModule:
    """`masked_scatter`, or `index_put` if it has to be exact, of up to 12 rows of 3 elements."""
    gm, emit, (h, mask, rows) = blank(torch.zeros(12, 3), torch.zeros(12, dtype=torch.bool), torch.zeros(12, 3))
    if exact:
        return returns(gm, emit(aten.index_put.default, h, [mask], rows))
    return returns(gm, emit(aten.masked_scatter.default, h, emit(aten.unsqueeze.default, mask, -1), rows))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_any_mask(places: list[bool]) -> None:
    gm = scattered(exact=False)
    assert MaskedWritesToWhere()(gm).modified
    h, mask, rows = torch.randn(12, 3), torch.tensor(places), torch.randn(12, 3)
    assert torch.equal(run(gm, h, mask, rows)[0], h.masked_scatter(mask[:, None], rows))


def test_too_few_rows_are_an_error_as_before() -> None:
    model = Merge(WRITES["masked_scatter"])
    gm = graph_of(model, HIDDEN, IDS, FEATURES)
    MaskedWritesToWhere()(gm)
    with pytest.raises(IndexError):
        run(gm, HIDDEN, torch.full_like(IDS, 4), FEATURES)


def test_too_many_rows_are_an_error_where_they_were() -> None:
    gm = scattered(exact=True)
    MaskedWritesToWhere()(gm)
    mask = torch.arange(12) < 11
    with pytest.raises(RuntimeError, match="as many values"):
        run(gm, torch.zeros(12, 3), mask, torch.zeros(12, 3))


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "write",
    [
        lambda h, m, f: h.index_put((m,), f, accumulate=True),
        lambda h, m, f: put(h, (m.nonzero()[:, 1] % 2, m.nonzero()[:, 1]), f),
        lambda h, m, f: put(h, (slice(None), m[0]), f.view(2, 2, 6)),
        lambda h, m, f: put(h, torch.where(m[:, :3]), f[:3]),
        lambda h, m, f: put(h, torch.where(m[:1]), f[0]),
    ],
    ids=["accumulate", "other indices", "a later axis", "places of a shorter mask", "places of its first row"],
)
def test_other_writes_stay(write: Write) -> None:
    assert declines(MaskedWritesToWhere, graph_of(Merge(write), HIDDEN, IDS, FEATURES)) == []


def test_rows_of_a_dynamic_width_stay() -> None:
    free = ({2: DYNAMIC}, None, {1: DYNAMIC})
    gm = graph_of(Merge(lambda h, m, f: put(h, m, f)), HIDDEN, IDS, FEATURES, dynamic_shapes=free)
    assert declines(MaskedWritesToWhere, gm) == []
