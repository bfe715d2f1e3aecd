"""Tensors that a model fills slice by slice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from passes.graph import aten
from passes.normalize.slice_scatter import ScattersToConcat
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites


class Fill(nn.Module):
    def __init__(self, fill: Callable[[Tensor, Tensor], None], *, half: bool = False) -> None:
        super().__init__()
        self.fill, self.half = fill, half

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 3, 6, dtype=torch.float16 if self.half else x.dtype)
        self.fill(y, x)
        return y.sin()


def two(y: Tensor, x: Tensor) -> None:
    y[..., :4] = x
    y[..., 4:] = x[..., :2].neg()


def backwards(y: Tensor, x: Tensor) -> None:
    y[..., -2:] = x[:, :, :2]
    y[..., 1:-2] = x[:, :, 1:]
    y[..., :1] = x[:, :, :1]


def expanded(y: Tensor, x: Tensor) -> None:
    y[..., :4] = x
    y[..., 4:] = x[:, :1, :2]


def gap(y: Tensor, x: Tensor) -> None:
    y[..., :2] = x[..., :2]
    y[..., 3:6] = x[..., :3]


def overlap(y: Tensor, x: Tensor) -> None:
    y[..., :4] = x
    y[..., 3:] = x[..., :3]


def stepped(y: Tensor, x: Tensor) -> None:
    y[..., ::2] = x[..., :3]
    y[..., 1::2] = x[..., :3]


def once(y: Tensor, x: Tensor) -> None:
    y[..., :4] = x


@pytest.mark.everyday(2)
@pytest.mark.parametrize("fill", [two, backwards, expanded])
def test_pieces_side_by_side_are_concatenated(fill: Callable[[Tensor, Tensor], None]) -> None:
    gm = graph_of(Fill(fill), torch.randn(2, 3, 4), dynamic_shapes=({0: DYNAMIC},))
    rewrites(ScattersToConcat, gm, torch.randn(5, 3, 4))
    FileCheck().check_not("slice_scatter").check_count("aten.cat.default", 1, exactly=True).run(gm.code)
    assert count(gm, aten.new_zeros.default) == 0 or fill is expanded  # whose shape the copy still reads


def test_a_cast_on_the_way_stays() -> None:
    x = torch.randn(2, 3, 4)
    gm = graph_of(Fill(two, half=True), x)
    rewrites(ScattersToConcat, gm, x)
    assert count(gm, aten.cat.default) == 1


@pytest.mark.parametrize("fill", [gap, overlap, stepped])
def test_what_does_not_fill_the_tensor_is_declined(fill: Callable[[Tensor, Tensor], None]) -> None:
    gm = graph_of(Fill(fill), torch.randn(2, 3, 4))
    assert declines(ScattersToConcat, gm) == ["what is written to this tensor does not fill it side by side"]


def test_one_write_is_not_looked_at() -> None:
    assert declines(ScattersToConcat, graph_of(Fill(once), torch.randn(2, 3, 4))) == []


def test_another_user_keeps_the_tensor_half_filled() -> None:
    class Read(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.new_zeros(2, 3, 6)
            y[..., :4] = x
            before = y.exp()
            y[..., 4:] = x[..., :2]
            return before, y.sin()

    x = torch.randn(2, 3, 4)
    gm = graph_of(Read(), x)
    rewrites(ScattersToConcat, gm, x)
    assert (count(gm, aten.slice_scatter.default), count(gm, aten.cat.default)) == (1, 1)
