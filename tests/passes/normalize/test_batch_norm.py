"""Batch norms in front of and behind layers, judged by the values that the graph had before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from passes.base import run_pipeline
from passes.graph import aten
from passes.normalize import folded_layer
from passes.normalize.batch_norm import FoldBatchNorm
from passes.normalize.convolution import NormalizeConvolution
from passes.normalize.folded_layer import PIECE
from passes.normalize.views import ViewsToReshape
from passes.testing import count, declines, graph_of, rewrites

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
NORM = aten._native_batch_norm_legit_no_training.default


def trained(norm: nn.Module) -> Any:
    """`norm` with numbers of its own."""
    for name in ("running_mean", "weight", "bias"):
        if getattr(norm, name) is not None:
            nn.init.normal_(getattr(norm, name))
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def graph(module: nn.Module, *inputs: Tensor) -> GraphModule:
    gm = graph_of(module, *inputs)
    run_pipeline((ViewsToReshape, NormalizeConvolution), gm)
    return gm


class Frozen(nn.Module):
    """As torchvision writes it for detection models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


@given(
    st.sampled_from([(4, 6, 1), (4, 4, 4), (4, 8, 2), (6, 3, 3), (4, 4, 1)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
)
def test_behind_a_convolution(
    sizes: tuple[int, int, int], transposed: bool, bias: bool, affine: bool, dims: int
) -> None:
    inputs, outputs, groups = sizes
    kind = f"Conv{'Transpose' * transposed}{dims}d"
    layer = getattr(nn, kind)(inputs, outputs, 3, padding=1, groups=groups, bias=bias)
    norm = trained(getattr(nn, f"BatchNorm{dims}d")(outputs, affine=affine))
    x = torch.randn(2, inputs, *[6] * dims)
    gm = graph(nn.Sequential(layer, norm), x)
    rewrites(FoldBatchNorm, gm, x, **TOLERANCE)
    assert count(gm, NORM) == 0
    assert gm.state_dict().keys() >= {"0.weight", "0.bias"}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("piece", [PIECE, 100])
def test_in_front_of_a_convolution(groups: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded_layer, "PIECE", piece)
    x = torch.randn(2, 4, 6, 6)
    gm = graph(nn.Sequential(trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 8, 3, groups=groups)), x)
    rewrites(FoldBatchNorm, gm, x, **TOLERANCE)
    assert count(gm, NORM) == 0


def test_zeros_of_a_padding_are_no_zeros_in_front_of_the_norm() -> None:
    x = torch.randn(2, 4, 6, 6)
    padded = nn.Conv2d(4, 8, 3, padding=1)
    gm = graph(nn.Sequential(trained(nn.BatchNorm2d(4)), padded), x)
    assert declines(FoldBatchNorm, gm) == ["the convolution behind it pads with zeros, which the norm does not see"]
    norm = trained(nn.BatchNorm2d(4))
    nn.init.zeros_(norm.bias)
    nn.init.zeros_(norm.running_mean)
    rewrites(FoldBatchNorm, graph(nn.Sequential(norm, padded), x), x, **TOLERANCE)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_beside_a_linear_layer(before: bool, bias: bool) -> None:
    linear = nn.Linear(4, 4, bias=bias)
    norm, x = trained(nn.BatchNorm1d(4)), torch.randn(5, 4)
    gm = graph(nn.Sequential(norm, linear) if before else nn.Sequential(linear, norm), x)
    rewrites(FoldBatchNorm, gm, x, **TOLERANCE)
    assert count(gm, NORM) == 0


def test_channels_of_a_linear_layer_of_three_axes_are_others() -> None:
    gm = graph(nn.Sequential(nn.Linear(4, 4), trained(nn.BatchNorm1d(3))), torch.randn(5, 3, 4))
    assert declines(FoldBatchNorm, gm) == []


def test_frozen() -> None:
    x = torch.randn(2, 3, 6, 6)
    gm = graph(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Frozen(4), nn.ReLU()), x)
    rewrites(FoldBatchNorm, gm, x, fired=2, **TOLERANCE)
    assert count(gm, aten.mul.Tensor, aten.add.Tensor, aten.rsqrt.default) == 0


class SecondReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y).relu() + y


class Wide(TorchDispatchMode):
    """Notes the largest tensor in float64 that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype is torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_weight_is_never_whole_in_float64(transposed: bool) -> None:
    layer: Any = nn.ConvTranspose2d(64, 128, 3) if transposed else nn.Conv2d(64, 128, 3, groups=2)
    norm = trained(nn.BatchNorm2d(128))
    x = torch.randn(1, 64, 3, 3, dtype=torch.float16)
    gm = graph(nn.Sequential(layer, norm).half(), x)
    wide = Wide()
    with wide:
        FoldBatchNorm()(gm)
    assert 0 < wide.largest <= PIECE < layer.weight.numel()
    fused = fuse_conv_bn_eval(layer.double(), norm.double(), transpose=transposed)  # torch's own
    assert torch.equal(dict(gm.named_parameters())["0.weight"], fused.weight.half())


def test_a_second_reader_keeps_its_values() -> None:
    gm = graph(SecondReader(), torch.randn(1, 3, 6, 6))
    assert declines(FoldBatchNorm, gm) == ["the layer before it has another reader, which wants its values as they are"]


class Levels(nn.Module):
    """One convolution and one norm for two inputs, and the convolution without the norm for a third."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.plain = nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4)), plain

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        first, second = self.norm(self.conv(x)), self.norm(self.conv(y))
        return [first, second, *([self.conv(x + 1)] if self.plain else [])]


@pytest.mark.parametrize("plain", [True, False])
def test_a_shared_convolution_is_stored_once(plain: bool) -> None:
    inputs = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 4, 4)
    gm = graph(Levels(plain), *inputs)
    rewrites(FoldBatchNorm, gm, *inputs, fired=2, **TOLERANCE)
    weights = {str(node.args[1]) for node in gm.graph.nodes if node.target is aten.convolution.default}
    names = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if str(n.target).endswith("weight") and n.users}
    assert names == ({"conv.weight", "conv.computed_1.weight"} if plain else {"conv.weight"}), weights


def test_a_norm_between_layers_goes_into_the_first() -> None:
    x = torch.randn(2, 3, 8, 8)
    gm = graph(nn.Sequential(nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3, padding=1)), x)
    rewrites(FoldBatchNorm, gm, x, **TOLERANCE)


def test_what_leaves_the_dtype_stays() -> None:
    norm = trained(nn.BatchNorm2d(4))
    nn.init.constant_(norm.weight, 6e4)
    nn.init.constant_(norm.running_var, 1e-2)
    gm = graph(nn.Sequential(nn.Conv2d(3, 4, 3), norm).half(), torch.randn(1, 3, 6, 6).half())
    assert declines(FoldBatchNorm, gm) == ["what it is folded to leaves torch.float16"]


def test_a_weight_that_is_computed_stays() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = trained(nn.BatchNorm2d(4))

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return self.norm(torch.conv2d(x, w))

    gm = graph(Hyper(), torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3))
    (reason,) = declines(FoldBatchNorm, gm)
    assert "computed at run time" in reason


def test_a_norm_without_a_layer_stays() -> None:
    gm = graph(nn.Sequential(nn.ReLU(), trained(nn.BatchNorm2d(4)), nn.ReLU()), torch.randn(1, 4, 6, 6))
    assert declines(FoldBatchNorm, gm) == []
