"""Every way to write a convolution, with the values of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passes.graph import aten
from passes.normalize.convolution import NormalizeConvolution
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Call(nn.Module):
    """`form(x, w, b)` with parameters."""

    def __init__(self, form: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.form = form
        self.parameters_ = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, *self.parameters_)


def neutral(module: nn.Module, *inputs: Tensor, **options: Any) -> list[Any]:
    """Stride and all that follows of the one convolution that `module` becomes."""
    gm = graph_of(module, *inputs, **options)
    rewrites(NormalizeConvolution, gm, *inputs)
    node = only_call(gm, aten.convolution.default)
    assert not node.kwargs
    return list(node.args[3:])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_each_number_of_dimensions(dims: int, batched: bool, bias: bool) -> None:
    x = torch.randn(*([2] if batched else []), 4, *[7] * dims)
    found = neutral(CONVOLUTIONS[dims](4, 6, 3, stride=2, padding=1, groups=2, bias=bias), x)
    assert found == [[2] * dims, [1] * dims, [1] * dims, False, [0] * dims, 2]
    found = neutral(TRANSPOSED[dims](4, 6, 3, stride=2, output_padding=1, dilation=2, bias=bias), x)
    assert found == [[2] * dims, [0] * dims, [2] * dims, True, [1] * dims, 1]


@given(
    st.sampled_from([1, 2]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["same", "valid"]),
)
def test_padding_in_words(dims: int, kernel: int, dilation: int, padding: str) -> None:
    x = torch.randn(1, 2, *[13] * dims)
    found = neutral(CONVOLUTIONS[dims](2, 3, kernel, dilation=dilation, padding=padding), x)
    total = dilation * (kernel - 1) if padding == "same" else 0
    assert found[1] == [total // 2] * dims


def test_an_odd_zero_stands_behind() -> None:
    gm = graph_of(nn.Conv2d(2, 3, (4, 3), padding="same"), torch.randn(1, 2, 8, 8))
    rewrites(NormalizeConvolution, gm, torch.randn(1, 2, 8, 8))
    assert only_call(gm, aten.constant_pad_nd.default).args[1] == [0, 0, 0, 1]


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_a_padding_of_another_kind_stays_before_it(mode: str) -> None:
    gm = graph_of(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), torch.randn(1, 2, 8, 8))
    rewrites(NormalizeConvolution, gm, torch.randn(1, 2, 8, 8))
    assert count(gm, aten.pad.default) == 1
    assert only_call(gm, aten.convolution.default).args[4] == [0, 0]


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (lambda x, w: torch.conv2d(x, w, stride=2), [(3, 2, 3, 3)]),
        (lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), [(3, 2, 3, 3)]),
        (lambda x, w, b: torch.conv2d(x, weight=w, bias=b, groups=2), [(4, 1, 3, 3), (4,)]),
        (lambda x, w: F.conv_transpose2d(x, w, padding=(1, 0)), [(2, 3, 3, 3)]),
    ],
)
def test_calls(form: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    neutral(Call(form, *shapes), torch.randn(1, 2, 8, 8))


def test_dynamic_sizes() -> None:
    shapes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    gm = graph_of(nn.Conv2d(2, 3, 4, padding="same"), torch.randn(2, 2, 8, 9), dynamic_shapes=shapes)
    rewrites(NormalizeConvolution, gm, torch.randn(3, 2, 11, 10))


def test_the_neutral_form_stays() -> None:
    gm = graph_of(nn.Conv2d(2, 3, 3), torch.randn(1, 2, 8, 8))
    NormalizeConvolution()(gm)
    assert declines(NormalizeConvolution, gm) == []
