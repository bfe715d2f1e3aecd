"""Views become reshapes, which hold whatever the strides are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from passes.graph import Emitter, aten
from passes.normalize.views import ViewsToReshape
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Attention


class Viewed(nn.Module):
    """Views x, and what relu makes of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.relu()
        return y.view(-1, 2), y


def test_every_view_becomes_a_reshape_of_the_same_values() -> None:
    gm = graph_of(Attention(), torch.randn(2, 5, 16))
    views = count(gm, aten.view.default, aten._unsafe_view.default)
    assert views >= 3
    rewrites(ViewsToReshape, gm, torch.randn(2, 5, 16), fired=views)
    FileCheck().check_not("aten.view").check("aten.reshape.default").check_not("aten.view").run(gm.code)


def test_another_layout_before_a_view_no_longer_matters() -> None:
    gm = graph_of(Viewed(), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    rewrites(ViewsToReshape, gm, torch.randn(5, 4))
    relu = only_call(gm, aten.relu.default)
    emit = Emitter(relu.next)
    turned = emit(aten.transpose.int, emit(aten.clone.default, emit(aten.transpose.int, relu, 0, 1)), 0, 1)
    only_call(gm, aten.reshape.default).update_arg(0, turned)
    gm.recompile()
    x = torch.randn(5, 4)
    torch.testing.assert_close(run(gm, x), [x.relu().reshape(-1, 2), x.relu()], rtol=0, atol=0)


def test_a_size_that_is_known_is_written_out() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.view(x.shape[0], -1, 2), x.reshape(-1, 6)

    gm = graph_of(Heads(), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    rewrites(ViewsToReshape, gm, torch.randn(6, 4), fired=2)
    FileCheck().check("2, 2]").run(gm.code)
    assert gm.code.count("-1") == 1  # the batch is dynamic


def test_a_view_of_another_dtype_is_not_a_reshape() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.int32) + 1

    gm = graph_of(Bits(), torch.randn(3, 4))
    assert declines(ViewsToReshape, gm) == []
    assert count(gm, aten.view.dtype) == 1
