from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten
from passes.normalize.noops import RemoveNoOps
from passes.normalize.rms_norm import NormalizeRmsNorm
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

# One rounding less than written: half an ulp of the weighted value.
ROUNDING = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}
EPS = 1e-5


class Norm(nn.Module):
    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=dtype))


class Llama(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype)


class T5(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * (y.to(self.weight.dtype) if self.weight.dtype is not torch.float32 else y)


class Gemma(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Root(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x / (EPS + (x * x).mean(-1, keepdim=True)).sqrt() * self.weight


class Power(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.pow(x.pow(2).mean(2, keepdim=True) + EPS, -0.5)) * self.weight


class Unweighted(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def prepared(module: nn.Module, x: Tensor, dynamic: object = None) -> GraphModule:
    gm = graph_of(module, x, dynamic_shapes=dynamic)
    RemoveNoOps()(gm)
    return gm


@pytest.mark.everyday(6)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("norm", [Llama, T5, Gemma, Root, Power, Unweighted])
def test_fires(norm: type[Norm], dtype: torch.dtype) -> None:
    if norm in (Root, Power, Unweighted) and dtype is not torch.float32:
        pytest.skip("these compute in the dtype of x")
    x = torch.randn(2, 3, 8, dtype=dtype)
    gm = prepared(norm(dtype=dtype), x)
    rewrites(NormalizeRmsNorm, gm, x, **ROUNDING[dtype])
    assert count(gm, aten.rms_norm.default) == 1
    assert count(gm, aten.rsqrt.default, aten.mean.dim, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.div.Tensor) == 0
    node = only_call(gm, aten.rms_norm.default)
    assert node.args[1] == [8] and node.args[3] == EPS
    assert (node.args[2] is None) == (norm is Unweighted)


@pytest.mark.parametrize("norm", [Llama, Gemma])
def test_computes_in_half_only_if_the_weight_is_multiplied_in_half(norm: type[Norm]) -> None:
    x = torch.randn(2, 8, dtype=torch.float16)
    gm = prepared(norm(dtype=torch.float16), x)
    NormalizeRmsNorm()(gm)
    expected = torch.float16 if norm is Llama else torch.float32
    assert only_call(gm, aten.rms_norm.default).meta["val"].dtype is expected


@settings(max_examples=6)  # each is an export
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 33), st.floats(0.01, 100))
def test_values(batch: int, length: int, width: int, size: float) -> None:
    x = torch.randn(batch, length, width) * size
    gm = prepared(Llama(width), x)
    rewrites(NormalizeRmsNorm, gm, x, rtol=1e-5, atol=1e-5)


def test_second_user_of_the_normalized_value_keeps_it() -> None:
    class Both(Norm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
            return self.weight * y, y.neg()

    x = torch.randn(2, 8)
    gm = prepared(Both(), x)
    rewrites(NormalizeRmsNorm, gm, x, **ROUNDING[torch.float32])
    assert only_call(gm, aten.rms_norm.default).args[2] is None
    assert count(gm, aten.mul.Tensor) == 1


def test_second_user_of_the_mean_square_keeps_it() -> None:
    class Both(Norm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean = x.pow(2).mean(-1, keepdim=True)
            return self.weight * (x * torch.rsqrt(mean + EPS)), mean.neg()

    x = torch.randn(2, 8)
    gm = prepared(Both(), x)
    rewrites(NormalizeRmsNorm, gm, x, **ROUNDING[torch.float32])
    assert count(gm, aten.mean.dim) == 1


def test_declines_a_computed_eps() -> None:
    class Learned(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.weight.sum())

    gm = prepared(Learned(), torch.randn(2, 8))
    assert declines(NormalizeRmsNorm, gm) == ["the number added to the mean square is not a constant"]


def test_weight_of_another_dtype_stays_a_multiplication() -> None:
    class Mixed(Norm):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))

    x = torch.randn(2, 8, dtype=torch.float16)
    gm = prepared(Mixed(dtype=torch.float64), x)
    log = rewrites(NormalizeRmsNorm, gm, x, **ROUNDING[torch.float32])
    assert [d.reason for d in log.declined] == [
        "the weight is torch.float64, and x torch.float16: it stays a multiplication"
    ]
    assert count(gm, aten.mul.Tensor) == 1


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),  # another axis
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS),  # not squares
        lambda x: x.neg() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),  # of something else
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + EPS),  # no root
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - EPS),  # less eps
        lambda x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS, alpha=2)),  # twice eps
    ],
)
def test_leaves_what_is_no_rms_norm(forward: object) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)  # type: ignore[operator, no-any-return]

    assert declines(NormalizeRmsNorm, prepared(Module(), torch.randn(2, 3, 8))) == []


def test_dynamic_shapes() -> None:
    x = torch.randn(2, 3, 8)
    gm = prepared(Llama(), x, dynamic=({0: DYNAMIC, 1: DYNAMIC},))
    rewrites(NormalizeRmsNorm, gm, x, **ROUNDING[torch.float32])
