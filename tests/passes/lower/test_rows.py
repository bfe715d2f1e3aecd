"""Rows of tensors as matrices, padded and cut to the size that kernels take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.graph import Emitter, aten, shape
from passes.lower.rows import add_bias, as_rows, first_rows, like_input, pad_by, pad_rows
from passes.testing import DYNAMIC, blank, count, graph_of, only_call, returns, run


@pytest.mark.parametrize("sizes", [(4, 8), (2, 3, 8), (2, 3, 4, 8), (8,)], ids=str)
def test_a_matrix_and_back(sizes: tuple[int, ...]) -> None:
    x = torch.randn(sizes)
    gm, emit, (node,) = blank(x)
    rows = as_rows(emit, node)
    assert len(shape(rows)) == 2 and shape(rows)[-1] == 8
    back = like_input(emit, rows, node)
    assert count(gm, aten.reshape.default) == (0 if len(sizes) == 2 else 2)
    flat, same = run(returns(gm, rows, back), x)
    assert torch.equal(flat, x.reshape(-1, 8)) and torch.equal(same, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_zeros_below(dtype: torch.dtype) -> None:
    x = torch.arange(1.0, 7.0).reshape(3, 2).to(dtype)
    gm, emit, (node,) = blank(x)
    (padded,) = run(returns(gm, pad_by(emit, node, 2)), x)
    assert padded.dtype is dtype
    assert torch.equal(padded.float(), torch.cat([x.float(), torch.zeros(2, 2)]))
    assert count(gm, aten.view.dtype) == (2 if "float8" in str(dtype) else 0)


@pytest.mark.parametrize(("rows", "padded"), [(4, 4), (5, 8), (7, 8), (8, 8), (1, 4)])
def test_rows_up_to_a_multiple_and_cut_again(rows: int, padded: int) -> None:
    gm, emit, (node,) = blank(torch.randn(rows, 3))
    check_rows(gm, emit, emit(aten.relu.default, node), rows, padded, whole=rows == padded)


@pytest.mark.parametrize(("rows", "padded"), [(5, 8), (8, 8)])
def test_dynamic_rows_up_to_a_multiple_and_cut_again(rows: int, padded: int) -> None:
    gm = graph_of(nn.ReLU(), torch.randn(6, 3), dynamic_shapes=({0: DYNAMIC},))
    check_rows(gm, Emitter(gm.graph.output_node()), only_call(gm, aten.relu.default), rows, padded, whole=False)


def check_rows(gm: GraphModule, emit: Emitter, relu: Node, rows: int, padded: int, *, whole: bool) -> None:
    """`whole`: it is known that the rows need no padding."""
    wide = pad_rows(emit, relu, 4)
    cut = first_rows(emit, wide, relu)
    assert (wide is relu) == (cut is wide) == whole
    x = torch.randn(rows, 3)
    all_rows, first = run(returns(gm, wide, cut), x)
    assert all_rows.shape == (padded, 3) and not all_rows[rows:].any()
    assert torch.equal(first, x.relu())


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).half()], ids=str)
@pytest.mark.parametrize("to", [torch.float16, torch.float32], ids=str)
def test_a_bias_is_added_before_the_one_rounding(bias: Tensor | None, to: torch.dtype) -> None:
    x = torch.randn(3, 2) * 100
    gm, emit, nodes = blank(x, *([] if bias is None else [bias]))
    result = add_bias(emit, nodes[0], nodes[1] if bias is not None else None, to)
    (got,) = run(returns(gm, result), x, *([] if bias is None else [bias]))
    want = (x if bias is None else x + bias.float()).to(to)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_needs_no_cast_gets_none() -> None:
    x = torch.randn(3, 2)
    gm, emit, (node, bias) = blank(x, torch.randn(2))
    assert add_bias(emit, node, None, torch.float32) is node
    add_bias(emit, node, bias, torch.float32)
    assert count(gm, aten._to_copy.default) == 0
