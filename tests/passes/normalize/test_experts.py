"""Products with a batch of constant matrices as the linear layers of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten
from passes.ir import BATCHED_LINEAR
from passes.normalize.experts import NormalizeExperts
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

E, K, N = 3, 4, 6
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = {0: DYNAMIC}


class Product(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], Any]] = {
    "bmm": (torch.bmm, (E, 5, K), (E, K, N), {1: DYNAMIC}),
    "bmm-transposed": (lambda x, w: torch.bmm(x, w.mT), (E, 5, K), (E, N, K), None),
    "bmm-weight-first": (lambda x, w: torch.bmm(w, x), (E, K, 5), (E, N, K), {2: DYNAMIC}),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(N), x, w), (E, 5, K), (E, K, N), None),
    "matmul-shared": (torch.matmul, (5, K), (E, K, N), ROWS),
    "matmul-batches": (lambda x, w: x[:, None] @ w, (2, 5, K), (E, K, N), {0: DYNAMIC, 1: DYNAMIC}),
    "matmul-own": (torch.matmul, (2, E, 5, K), (E, K, N), ROWS),
    "matmul-weight-first": (lambda x, w: w @ x, (2, E, K, 5), (E, N, K), ROWS),
    "einsum-shared": (lambda x, w: torch.einsum("td,edf->tef", x, w), (5, K), (E, K, N), ROWS),
    "einsum-own": (lambda x, w: torch.einsum("btef,efd->bted", x, w), (2, 5, E, K), (E, K, N), ROWS),
    "einsum-no-rows": (lambda x, w: torch.einsum("ed,edf->ef", x, w), (E, K), (E, K, N), None),
    "einsum-weight-first": (lambda x, w: torch.einsum("edf,td->etf", w, x), (5, K), (E, K, N), ROWS),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_becomes_a_batched_linear(case: tuple[Any, tuple[int, ...], tuple[int, ...], Any]) -> None:
    function, x_shape, w_shape, dynamic = case
    x = torch.randn(x_shape)
    gm = graph_of(Product(function, w_shape), x, dynamic_shapes=dynamic and (dynamic,))
    log = rewrites(NormalizeExperts, gm, x, **TOLERANCE)
    assert not log.declined and count(gm, BATCHED_LINEAR) == 1
    assert only_call(gm, BATCHED_LINEAR).args[1].meta["val"].shape == (E, N, K)  # type: ignore[union-attr]
    assert function is not torch.bmm or count(gm, aten.reshape.default) == 0  # the axes are there already


@pytest.mark.parametrize(
    ("function", "x", "shape", "reason"),
    [
        (lambda x, w: torch.einsum("tef,efd->td", x, w), (5, E, K), (E, K, N), "exactly one axis"),
        (lambda x, w: torch.einsum("btd,edf->etf", x, w), (2, 5, K), (E, K, N), "axis of the activations"),
        (lambda x, w: torch.einsum("ted,eef->tef", x, w), (5, K, E), (K, K, N), "axis"),
        (lambda x, w: torch.baddbmm(torch.ones(N), x, w, beta=2), (E, 5, K), (E, K, N), "multiplied by a number"),
        (torch.matmul, (2, 5, K), (1, K, N), "broadcast"),
        (lambda x, w: torch.einsum("efd,efd->ef", x, w), (E, N, K), (E, N, K), "two batch axes"),
    ],
)
def test_declines(function: Any, x: tuple[int, ...], shape: tuple[int, ...], reason: str) -> None:
    (found,) = declines(NormalizeExperts, graph_of(Product(function, shape), torch.randn(x)))
    assert reason in found


def test_products_of_activations_and_matrices_are_not_looked_at() -> None:
    class Activations(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    assert declines(NormalizeExperts, graph_of(Activations(), torch.randn(2, 3, 4), torch.randn(2, 4, 5))) == []
    assert declines(NormalizeExperts, graph_of(Product(torch.matmul, (K, N)), torch.randn(2, 5, K))) == []
    dots = Product(lambda x, w: torch.einsum("...d,edf->...ef", x, w), (E, K, N))
    assert declines(NormalizeExperts, graph_of(dots, torch.randn(2, 5, K))) == []


def test_what_is_not_looked_at_or_declined_does_not_end_the_search() -> None:
    def three(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(torch.einsum("bmk,ekn->bmn", torch.bmm(x, x.mT) @ x, w)[..., :K], w)

    x = torch.randn(E, 5, K)
    log = rewrites(NormalizeExperts, graph_of(Product(three, (E, K, N)), x), x, **TOLERANCE)
    assert len(log.declined) == 1


def test_another_user_of_the_product_gets_the_same() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y.relu() + y.sum()

    x = torch.randn(5, K)
    rewrites(NormalizeExperts, graph_of(Product(twice, (E, K, N)), x), x, **TOLERANCE)
