from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.constants import add_constant
from passes.graph import aten
from passes.normalize.einsum import NormalizeEinsum
from passes.normalize.linear import NormalizeLinear
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, rewrites

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(labels: str) -> Tensor:
    """A random tensor; each letter has a size of its own, whichever way it is written, and dots are two axes."""
    before, dots, after = labels.replace(" ", "").lower().partition("...")
    sizes = [[2 + ord(label) % 5 for label in part] for part in (before, after)]
    return torch.randn([*sizes[0], *((2, 3) if dots else ()), *sizes[1]])


def inputs(equation: str) -> list[Tensor]:
    return [made(labels) for labels in equation.partition("->")[0].split(",")]


def einsum(equation: str, *operands: Tensor, constant: int | None = None) -> GraphModule:
    """A graph of one einsum, one of whose operands is a constant if `constant` says which."""
    gm, emit, nodes = blank(*(x for index, x in enumerate(operands) if index != constant))
    if constant is not None:
        weight = nn.Parameter(operands[constant], requires_grad=False)
        nodes.insert(constant, add_constant(gm, "linear.weight", weight, gm.graph.output_node()))
    return returns(gm, emit(aten.einsum.default, equation, nodes))


@pytest.mark.parametrize(
    "equation",
    [
        "bhid,bhjd->bhij",
        "B H I D, B H J D -> B H I J",
        "b i h d, b j h d -> b h i j",
        "...id,...jd->...ij",
        "bsgrd,btgd->bgrst",  # grouped heads
        "bgrst,btgd->bsgrd",
        "bhij,bhjd->bhdi",
        "bi,bjk",
        "ij,jk",
        "bi,bi->b",
        "i,j->ij",
        "bi,bi->bi",
        "b i j -> b j",
        "bhid,bhjd,bhje->bhie",
        "ij,ij,j->i",
        "a,a->",
    ],
)
def test_fires(equation: str) -> None:
    operands = inputs(equation)
    gm = einsum(equation, *operands)
    rewrites(NormalizeEinsum, gm, *operands, **CLOSE)
    assert count(gm, aten.einsum.default) == 0


def test_no_more_operators_than_the_model_would_take() -> None:
    """q and k as `[B, S, H, D]`."""
    gm = einsum("bihd,bjhd->bhij", *inputs("bihd,bjhd->bhij"))
    NormalizeEinsum()(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        *[aten.permute.default] * 2,
        aten.matmul.default,
    ]
    gm = einsum("bhij,bhjd->bhid", *inputs("bhij,bhjd->bhid"))
    NormalizeEinsum()(gm)
    assert only_call(gm, aten.matmul.default).args == tuple(gm.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize(
    "equation", ["...d,df->...f", "bsd,fd->bsf", "D F, B D -> B F", "bshk,hkd->bsd", "bd,dfgh->bfgh", "bcxy,cd->bdxy"]
)
def test_a_constant_makes_a_linear_layer(equation: str) -> None:
    operands = inputs(equation)
    constant = int(not equation.startswith("D"))
    gm = einsum(equation, *operands, constant=constant)
    rewrites(NormalizeEinsum, gm, operands[1 - constant], **CLOSE)
    NormalizeLinear()(gm)
    assert count(gm, aten.linear.default) == 1 and count(gm, aten.matmul.default) == 0


@pytest.mark.parametrize(
    ("a", "b"), [((1, 4, 8), (2, 5, 8)), ((2, 4, 8), (2, 5, 1)), ((1, 4, 1), (3, 5, 8)), ((1, 4, 8), (1, 5, 8))]
)
def test_axes_of_size_one_broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    operands = torch.randn(a), torch.randn(b)
    rewrites(NormalizeEinsum, einsum("bid,bjd->bij", *operands), *operands, **CLOSE)


@settings(max_examples=15)
@given(st.data())
def test_any_equation(data: st.DataObject) -> None:
    labels = st.text("abcdE", max_size=4).map(lambda text: "".join(dict.fromkeys(text)))
    terms = data.draw(st.lists(labels, min_size=1, max_size=3))
    used = sorted({*"".join(terms)})
    result = "".join(
        data.draw(st.permutations(data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []))
    )
    equation = f"{','.join(terms)}->{result}"
    operands = inputs(equation)
    for index in data.draw(st.sets(st.integers(0, len(terms) - 1))):  # some broadcast over their first axis
        operands[index] = operands[index][:1] if terms[index] else operands[index]
    rewrites(NormalizeEinsum, einsum(equation, *operands), *operands, **CLOSE)


def test_what_stays_is_spelled_as_tensorrt_wants_it() -> None:
    gm = einsum(" ... I I -> ... I", torch.randn(2, 3, 4, 4))
    log = rewrites(NormalizeEinsum, gm, torch.randn(2, 3, 4, 4), **CLOSE)
    assert only_call(gm, aten.einsum.default).args[0] == "abcc->abc"
    assert [decline.reason for decline in log.declined] == ["this einsum takes a diagonal"]


@pytest.mark.parametrize("equation", ["td,edf->tef", "bd,d->b"])
def test_leaves_what_others_read(equation: str) -> None:
    assert declines(NormalizeEinsum, einsum(equation, *inputs(equation), constant=1)) == []


def test_several_dynamic_axes_are_merged_on_both_sides() -> None:
    class Pairs(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("bij,bijkl->bkl", a, b)

    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5, 6)
    axes = {axis: DYNAMIC for axis in range(5)}
    gm = graph_of(Pairs(), a, b, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC}, axes))
    rewrites(NormalizeEinsum, gm, a, b, **CLOSE)


def test_dynamic_shapes() -> None:
    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.einsum("b s g r d, b t g d -> b g r s t", q, k)

    q, k = torch.randn(2, 5, 2, 3, 8), torch.randn(2, 7, 2, 8)
    gm = graph_of(Heads(), q, k, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},) * 2)
    rewrites(NormalizeEinsum, gm, q, k, **CLOSE)
