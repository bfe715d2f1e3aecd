"""`nn.Fold` as a transposed convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.graph import aten
from passes.legalize.col2im import FoldToConvolution
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


class Fold(nn.Module):
    def __init__(self, *options: object) -> None:
        super().__init__()
        self.fold = nn.Fold(*options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.fold(x)


@given(kernel=pairs, dilation=pairs, padding=st.tuples(*[st.integers(0, 2)] * 2), stride=pairs, batch=st.integers(0, 2))
def test_any_fold(
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    stride: tuple[int, int],
    batch: int,
) -> None:
    size = (7, 9)
    patches = F.unfold(torch.randn(max(batch, 1), 2, *size), kernel, dilation, padding, stride)
    x = patches if batch else patches[0]
    gm = graph_of(Fold(size, kernel, dilation, padding, stride), x)
    rewrites(FoldToConvolution, gm, x, rtol=1e-5, atol=1e-5)
    assert count(gm, aten.col2im.default) == 0


def test_a_dynamic_batch_in_half() -> None:
    x = torch.randn(2, 27, 16).half()
    gm = graph_of(Fold((8, 8), 3, 1, 1, 2), x, dynamic_shapes=({0: DYNAMIC},))
    rewrites(FoldToConvolution, gm, x, rtol=1e-2, atol=1e-2)


def test_a_dynamic_size_stays() -> None:
    class Tiles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.fold(F.unfold(x, 2, stride=2).relu(), x.shape[-2:], 2, stride=2)

    gm = graph_of(Tiles(), torch.randn(2, 8, 4, 6), dynamic_shapes=({2: 2 * torch.export.Dim("half", min=1)},))
    assert declines(FoldToConvolution, gm) == ["its channels, or the size of its result, are dynamic"]
