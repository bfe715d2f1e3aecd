"""Group norms of tensors with two axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.graph import aten, shape
from passes.legalize.group_norm import LengthenGroupNorm
from tests.passes.support import DYNAMIC, declines, graph_of, only_call, rewrites


@pytest.mark.everyday(2)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dynamic", [None, ({0: DYNAMIC},)])
def test_rows_get_a_length(affine: bool, dynamic: object) -> None:
    x = torch.randn(3, 8)
    gm = graph_of(nn.GroupNorm(2, 8, eps=1e-3, affine=affine), x, dynamic_shapes=dynamic)
    make = LengthenGroupNorm
    rewrites(make, gm, x, rtol=1e-5, atol=1e-6)
    assert len(shape(only_call(gm, aten.group_norm.default))) == 3


def test_what_has_a_length_stays() -> None:
    assert declines(LengthenGroupNorm, graph_of(nn.GroupNorm(2, 8), torch.randn(3, 8, 4))) == []
