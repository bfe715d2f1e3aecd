"""Position biases and masks that no input changes, stored instead of computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.fold.masks import MAX_BYTES, FoldMasks
from passes.graph import aten
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites
from tests.passes.support import insert


class Biased(nn.Module):
    """Attention over [windows, 2, 4, 8] with a learned relative position bias and a mask by window, as Swin has."""

    def __init__(self, *, bias: bool = True, hide: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.bias, self.hide, self.twice = bias, hide, twice
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("positions", torch.randint(0, 9, (16,)))

    def mask(self) -> Tensor:
        bias = self.table[self.positions].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
        group = ((torch.arange(12) >= 5) * 1.0).view(3, 4)
        apart = group.unsqueeze(1) - group.unsqueeze(2)
        hide = apart.masked_fill(apart != 0, -100.0).unsqueeze(1)
        return bias + hide if self.bias and self.hide else bias if self.bias else hide

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask()
        y = nn.functional.scaled_dot_product_attention(x, x, x, mask)
        return nn.functional.scaled_dot_product_attention(y, x, x, mask) if self.twice else y


COMPUTED = (aten.index.Tensor, aten.permute.default, aten.arange.default, aten.masked_fill.Scalar, aten.ge.Scalar)


@pytest.mark.parametrize("bias", [False, True])
def test_one_constant(bias: bool) -> None:
    x = torch.randn(3, 2, 4, 8)
    gm = graph_of(Biased(bias=bias, hide=not bias), x)
    rewrites(FoldMasks, gm, x)
    assert only_call(gm, SDPA).args[3].op == "get_attr"  # type: ignore[union-attr]
    assert count(gm, *COMPUTED) == 0


def test_a_sum_that_broadcasts_both_terms_stays() -> None:
    x = torch.randn(3, 2, 4, 8)
    gm = graph_of(Biased(), x)
    rewrites(FoldMasks, gm, x, fired=2)
    mask = only_call(gm, SDPA).args[3]
    assert mask.target is aten.add.Tensor  # type: ignore[union-attr]
    assert [term.op for term in mask.all_input_nodes] == ["get_attr"] * 2  # type: ignore[union-attr]


def test_attentions_that_share_a_mask_share_the_constant() -> None:
    x = torch.randn(3, 2, 4, 8)
    gm = graph_of(Biased(hide=False, twice=True), x)
    rewrites(FoldMasks, gm, x)
    first, second = (node for node in gm.graph.nodes if node.target is SDPA)
    assert first.args[3] is second.args[3]


def test_what_an_input_or_a_dynamic_size_changes_is_computed() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            steps = torch.arange(x.shape[2])
            mask = (steps[:, None] - steps[None]) * 1.0 + padding[:, None, None] * 2
            return nn.functional.scaled_dot_product_attention(x, x, x, mask)

    free = ({2: DYNAMIC}, {1: DYNAMIC})
    gm = graph_of(Masked(), torch.randn(3, 2, 4, 8), torch.randn(3, 4), dynamic_shapes=free)
    assert declines(FoldMasks, gm) == []
    x, padding = torch.randn(3, 2, 4, 8), torch.randn(3, 4)
    gm = graph_of(Masked(), x, padding)
    rewrites(FoldMasks, gm, x, padding)  # the distances only
    assert count(gm, aten.arange.default) == 0 and count(gm, aten.add.Tensor) == 1


def test_a_dynamic_batch_does_not_matter_to_a_bias() -> None:
    gm = graph_of(Biased(hide=False), torch.randn(3, 2, 4, 8), dynamic_shapes=({0: DYNAMIC},))
    rewrites(FoldMasks, gm, torch.randn(5, 2, 4, 8))


INDEX: dict[str, Callable[[], Tensor]] = {
    "meshgrid": lambda: torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)[0],
    "split": lambda: torch.arange(8).split([4, 4])[1] % 3,
    "sort": lambda: torch.arange(4).flip(0).sort().indices,
    "maximum": lambda: torch.arange(12).view(4, 3).max(1).values % 3,
}


@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX.keys())
def test_an_index_from_an_operator_with_several_results(index: Callable[[], Tensor]) -> None:
    class Indexed(Biased):
        def mask(self) -> Tensor:
            place = index()
            return self.table[place[:, None] - place[None] + 3].permute(2, 0, 1).unsqueeze(0)

    x = torch.randn(3, 2, 4, 8)
    gm = graph_of(Indexed(), x)
    rewrites(FoldMasks, gm, x)
    assert only_call(gm, SDPA).args[3].op == "get_attr"  # type: ignore[union-attr]


def test_a_large_mask_is_declined() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(x.shape[2])
            mask = (steps[:, None] - steps[None]).abs() < 16
            return nn.functional.scaled_dot_product_attention(x, x, x, mask)

    length = int(MAX_BYTES**0.5) + 1
    (reason,) = set(declines(FoldMasks, graph_of(Long(), torch.randn(1, 1, length, 8))))
    assert f"[{length}, {length}], is too large" in reason


def test_weights_behind_a_mask_that_the_model_computes_are_left() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, x @ (self.w * 2).t())

    assert declines(FoldMasks, graph_of(Learned(), torch.randn(3, 2, 4, 8))) == []


def test_what_quantized_weights_make_of_positions_is_computed() -> None:
    class Continuous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(2, 4)
            self.register_buffer("places", torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, self.mlp(self.places))

    gm = graph_of(Continuous(), torch.randn(3, 2, 4, 8))
    insert(gm, {"input": torch.tensor(0.1), "weight": torch.tensor(0.1)})
    assert declines(FoldMasks, gm) == []


def test_a_mask_that_is_cut_from_what_is_too_large_to_compute_is_declined() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.arange(60_000)[:, None] >= torch.arange(60_000)[None]
            return nn.functional.scaled_dot_product_attention(x, x, x, mask.logical_not()[:4, :4])

    (reason,) = declines(FoldMasks, graph_of(Cut(), torch.randn(3, 2, 4, 8)))
    assert reason.startswith("this part of the mask cannot be computed: ") and "too large" in reason
