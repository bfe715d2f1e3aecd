"""Operands of several dtypes get the one that torch computes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.testing import assert_close

from passes.graph import aten, calls, dtype, val
from passes.normalize.promotion import WriteOutPromotion
from passes.testing import DYNAMIC, blank, count, declines, graph_of, returns, rewrites, run

H, W, I = torch.randn(3, 4).half(), torch.randn(3, 4), torch.tensor([[1], [2], [5]])  # noqa: E741


class Of(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor, w: Tensor, i: Tensor) -> Tensor:
        return self.function(h, w, i)


PROMOTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cat": lambda h, w, i: torch.cat([h, w, i], -1),
    "concat": lambda h, w, i: torch.concat([h, w]),
    "hstack": lambda h, w, i: torch.hstack([h, w]),
    "stack": lambda h, w, i: torch.stack([h, w]),
    "bool in a cat": lambda h, w, i: torch.cat([h, i > 1], -1),
    "where": lambda h, w, i: torch.where(h > 0, h, w),
    "where int": lambda h, w, i: torch.where(h > 0, 0.5, i),
    "add": lambda h, w, i: h + w,
    "multiply": lambda h, w, i: torch.multiply(h, w),
    "maximum": lambda h, w, i: torch.maximum(h, w),
    "min": lambda h, w, i: torch.min(h, w),
    "clamp": lambda h, w, i: torch.clamp(h, max=w),
    "clamp ints": lambda h, w, i: torch.clamp(w, min=-i, max=i),
    "clamp an int": lambda h, w, i: i.clamp(min=1.5),
    "pow": lambda h, w, i: h.abs() ** w,
    "pow of an int": lambda h, w, i: i**-0.5,
    "number to the int": lambda h, w, i: 2.5**i,
    "rsub": lambda h, w, i: 1.0 - i,
    "mul int": lambda h, w, i: h * i,
    "mul bool": lambda h, w, i: h * (i > 1),
    "and": lambda h, w, i: (i > 1) & i,
    "gt": lambda h, w, i: i > 1.5,
    "eq": lambda h, w, i: i == 1.5,
    "greater": lambda h, w, i: torch.greater(h, w),
    "atan2": lambda h, w, i: torch.atan2(h, w),
    "outer": lambda h, w, i: torch.outer(h[0], w[0]),
    "remainder": lambda h, w, i: torch.remainder(i, 1.5),
    "floor_divide": lambda h, w, i: h // w,
    "ints": lambda h, w, i: i.int() * i + i.to(torch.uint8),
    "double": lambda h, w, i: h * w.double(),
    "addcmul": lambda h, w, i: torch.addcmul(h, w, w),
    "loss": lambda h, w, i: F.mse_loss(h, w),
    "similarity": lambda h, w, i: F.cosine_similarity(h, w),
    "copy": lambda h, w, i: h.new_zeros(h.shape).copy_(w),
    "slice": lambda h, w, i: torch.slice_scatter(h, w[:2], 0, 0, 2),
    "layer_norm": lambda h, w, i: F.layer_norm(h, (4,), w[0], w[1]),
    "group_norm": lambda h, w, i: F.group_norm(h, 2, w[0], w[1]),
    "rms_norm": lambda h, w, i: F.rms_norm(h, (4,), w[0]),
}


@pytest.mark.everyday(5)
@pytest.mark.parametrize("name", PROMOTED)
def test_operands_get_the_dtype_that_torch_computes_in(name: str) -> None:
    dynamic = {0: DYNAMIC} if name not in ("ints", "loss") else None
    gm = graph_of(Of(PROMOTED[name]), H, W, I, dynamic_shapes=(dynamic,) * 3)
    exact = "norm" not in name and name != "similarity"  # weights of a norm are rounded, dot products were
    expected = run(gm, H, W, I)
    assert WriteOutPromotion()(gm).modified
    assert_close(run(gm, H, W, I), expected, equal_nan=True, rtol=0 if exact else 2e-3, atol=0 if exact else 2e-3)
    declines(WriteOutPromotion, gm)
    choosing = (aten._to_copy.default, aten.where.self, aten.where.ScalarSelf, aten.broadcast_tensors.default)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target not in choosing:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
            assert len({dtype(n) for n in tensors}) <= 1, node.format_node()


UNTOUCHED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "indices": lambda h, w, i: w.index_select(0, i[:2, 0]) + F.embedding(i[:2, 0], w) + w.gather(0, i[:2] - 1),
    "masks": lambda h, w, i: w.masked_fill(i > 1, 0.0) + torch.where(i > 1, w, 0.5),
    "shapes": lambda h, w, i: h[:1].expand_as(w),
    "cast": lambda h, w, i: h.type_as(w) + h.float(),
    "truth": lambda h, w, i: torch.logical_and(h, i),
    "int number": lambda h, w, i: (i + 1) * 2 // 3 - (i > 1).long(),
    "float number": lambda h, w, i: h * 0.5 + 1,
    "true division": lambda h, w, i: i / 2,
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_of_one_dtype_or_no_operand_stays(name: str) -> None:
    h, w, i = H, W, I.clamp(max=2)
    assert declines(WriteOutPromotion, graph_of(Of(UNTOUCHED[name]), h, w, i)) == []


def test_a_tensor_is_cast_once_for_all_of_its_readers() -> None:
    gm = graph_of(Of(lambda h, w, i: h + w + torch.maximum(h, w)), H, W, I)
    rewrites(WriteOutPromotion, gm, H, W, I, fired=2)
    assert count(gm, aten._to_copy.default) == 1


def test_the_mask_of_an_attention_does_not_become_infinite() -> None:
    q, mask = torch.randn(1, 1, 3, 4).half(), torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)
    mask[1] = torch.finfo(torch.float32).min
    gm, emit, nodes = blank(q, mask)
    returns(gm, emit(aten.scaled_dot_product_attention.default, nodes[0], nodes[0], nodes[0], nodes[1]))
    assert WriteOutPromotion()(gm).modified
    (got,) = run(gm, q, mask)
    want = F.scaled_dot_product_attention(q.float(), q.float(), q.float(), mask)
    assert got.isfinite().all()
    rows = [0, 2]  # the other one is masked as a whole: which average it gives does not matter
    assert_close(got.float()[..., rows, :], want[..., rows, :], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_that_is_read_as_data_too_keeps_its_numbers_there(first: bool) -> None:
    q, bias = torch.randn(1, 1, 3, 4).half(), torch.full((3, 3), -6e4)
    gm, emit, (x, mask) = blank(q, bias)

    def as_data() -> Node:
        return emit(aten.slice_scatter.default, emit(aten.new_zeros.default, x, [3, 3]), mask)

    data = as_data() if first else None
    attention = emit(aten.scaled_dot_product_attention.default, x, x, x, mask)
    returns(gm, attention, data or as_data())
    before = run(gm, q, bias)
    assert WriteOutPromotion()(gm).modified
    assert_close(run(gm, q, bias)[1], before[1], rtol=0, atol=0)


DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.div.Tensor, aten.eq.Tensor, aten.lt.Tensor,
          aten.where.self, aten.cat.default)  # fmt: skip


@given(st.sampled_from(BINARY), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_promotion_is_torchs(target: object, a: torch.dtype, b: torch.dtype, flat: bool, other: bool) -> None:
    """Of every pair of dtypes, tensors without axes among them: what torch makes of them uncast."""
    x = (torch.arange(4) % 3).to(a) if not flat else torch.tensor(2).to(a)
    y = (torch.arange(4) % 2).to(b) if not other else torch.tensor(1).to(b)
    gm, emit, (left, right) = blank(x, y)
    if target is aten.cat.default:
        if flat or other:
            return
        node = emit(aten.cat.default, [left, right])
    elif target is aten.where.self:
        node = emit(aten.where.self, emit(aten.ne.Scalar, left, 0), left, right)
    else:
        node = emit(target, left, right)  # type: ignore[arg-type]
    returns(gm, node)
    before, was = run(gm, x, y), dtype(node)
    WriteOutPromotion()(gm)
    assert dtype(node) is was
    assert_close(run(gm, x, y), before, rtol=0, atol=0, equal_nan=True)
    (call,) = calls(gm.graph, target)  # type: ignore[arg-type]
    operands = [n for n in call.all_input_nodes if n not in call.args[:1] or target is not aten.where.self]
    assert len({val(n).dtype for n in operands}) == 1
