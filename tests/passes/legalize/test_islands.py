"""Float32 in the middle of a program in half precision: before a quantizer, around a router, without a half kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from passes.graph import aten, calls, dtype, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.scales import RoundScales
from passes.normalize.complex import ComplexToReal
from passes.normalize.noops import RemoveNoOps
from passes.testing import count, declines, graph_of, run
from tests.passes.support import insert

S = torch.tensor(0.02)


def to_half(target: torch.dtype = torch.float16) -> ConvertComputeDtype:
    return ConvertComputeDtype(torch.float32, target)


class Embedded(nn.Module):
    """A linear layer on numbers that are computed from integers, and one on data."""

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.first, self.body = embed, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.body(x) + self.first(self.embed(i))


def sinusoid(i: Tensor) -> Tensor:
    angle = i[:, None].float() * torch.exp(-torch.arange(4) / 4.0)
    return torch.cat([angle.sin(), angle.cos()], -1)


def pixels(i: Tensor) -> Tensor:
    return i.to(torch.uint8)[:, None].expand(-1, 8).float() / 255 - 0.5


def one_hot(i: Tensor) -> Tensor:
    return F.one_hot(i, 8).float()


def coordinates(i: Tensor) -> Tensor:
    return torch.arange(8).float()[None] / 8 * i[:, None]


@pytest.mark.everyday(3)
@pytest.mark.parametrize("embed", [sinusoid, pixels, one_hot, coordinates])
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_an_island_is_cast_before_it_is_quantized(embed: Callable[[Tensor], Tensor], target: torch.dtype) -> None:
    x, i = torch.randn(3, 8), torch.tensor([0, 5, 7])
    gm = graph_of(Embedded(embed), x, i)
    RemoveNoOps()(gm)
    insert(gm, {"input": S})
    expected = run(gm, x, i)
    assert to_half(target)(gm).modified
    declines(lambda: to_half(target), gm)
    for linear in calls(gm.graph, aten.linear.default):
        assert is_call(linear.args[0], DEQUANTIZE)  # and no cast between the two
        assert dtype(linear.args[0]) is target  # type: ignore[arg-type]
        assert dtype(linear.args[0].args[0].args[0]) is target  # type: ignore[union-attr,arg-type]
    RoundScales()(gm)
    tolerance = 0.03 if target is torch.float16 else 0.2
    assert_close(run(gm, x, i), expected, rtol=tolerance, atol=tolerance)


class Routed(nn.Module):
    """A router and a layer that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 4), nn.Linear(8, 8)
        self.scales = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        return self.expert(x) * (self.scales[chosen] * weight[..., None]).sum(-2)


@pytest.mark.parametrize("sites", [("input", "weight"), ("gate.input_quantizer", "gate.weight_quantizer"), ("weight",)])
def test_a_quantized_router_has_quantizers_of_its_own_in_float32(sites: tuple[str, ...]) -> None:
    x = torch.randn(3, 8)
    gm = graph_of(Routed(), x)
    insert(gm, dict.fromkeys(sites, S))
    expected = run(gm, x)
    assert to_half()(gm).modified
    declines(to_half, gm)
    RoundScales()(gm)
    gate, expert = calls(gm.graph, aten.linear.default)
    for linear, wanted in ((gate, torch.float32), (expert, torch.float16)):
        assert {dtype(operand) for operand in linear.args[:2]} == {wanted}  # type: ignore[arg-type]
        for operand in linear.args[:2]:
            if is_call(operand, DEQUANTIZE):
                assert dtype(operand.args[1]) is wanted  # type: ignore[union-attr,arg-type]
    assert not any(is_call(cast.args[0], DEQUANTIZE) for cast in calls(gm.graph, aten._to_copy.default))
    assert_close(run(gm, x), expected, rtol=0.02, atol=0.02)


# --- no kernel in half precision -----------------------------------------------------------------------------------


def spectrum(x: Tensor) -> Tensor:
    return torch.stft(x.flatten(1), 14, 4, window=torch.hann_window(14), return_complex=True).abs().transpose(1, 2)


def filtered(x: Tensor) -> Tensor:
    z = torch.fft.rfft(x, dim=1)[:, 1:] * torch.exp(1j * torch.arange(2).float())[:, None]
    return torch.fft.irfft(z, n=x.shape[1], dim=1)


def resized(x: Tensor) -> Tensor:
    return F.interpolate(x[:, None], size=(3, 8), mode="bicubic", antialias=True)[:, 0]


def solved(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x @ x.transpose(1, 2) + torch.eye(4)) @ x


ALONE = {
    "stft": spectrum,
    "fft_fft2": lambda x: torch.fft.fft2(x).real,
    "fft_rfft": filtered,
    "_upsample_bicubic2d_aa": resized,
    "linalg_cholesky": solved,
    "quantile": lambda x: x / x.abs().quantile(0.9, 1, keepdim=True),
    "cdist": lambda x: torch.cdist(x, x) @ x,
    "avg_pool3d": lambda x: F.local_response_norm(x[:, None].expand(-1, 3, -1, -1), 3)[:, 1],
    "linalg_eigh": lambda x: torch.linalg.eigh(x @ x.transpose(1, 2)).eigenvalues[..., None] + x,
}


class Between(nn.Module):
    def __init__(self, front: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.front, self.after = nn.Linear(8, 8), Front(front), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.front(self.before(x)))


class Front(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_what_has_no_half_kernel_runs_in_float32_and_is_named(name: str, target: torch.dtype) -> None:
    x = torch.randn(2, 4, 8)
    gm = graph_of(Between(ALONE[name]), x)
    RemoveNoOps()(gm)
    ComplexToReal()(gm)
    insert(gm, {"input": S})
    expected = run(gm, x)
    convert = to_half(target)
    convert(gm)
    again = to_half(target)
    assert not again(gm).modified
    (notice,) = convert.log.notices
    assert f"front ({name})" in notice
    assert again.log.notices == convert.log.notices
    assert {dtype(linear) for linear in calls(gm.graph, aten.linear.default)} == {target}
    assert {dtype(node.args[0]) for node in calls(gm.graph, QUANTIZE)} == {target}  # type: ignore[arg-type]
    assert "complex32" not in str([node.meta.get("val") for node in gm.graph.nodes])
    RoundScales()(gm)
    tolerance = 0.02 if target is torch.float16 else 0.2
    assert_close(run(gm, x), expected, rtol=tolerance, atol=tolerance)


def test_a_wider_target_needs_no_island() -> None:
    x = torch.randn(2, 4, 8)
    gm = graph_of(Between(lambda x: torch.special.zeta(x.float(), x.float()).to(x.dtype)).half(), x.half())
    convert = ConvertComputeDtype(torch.float16, torch.float32)
    assert convert(gm).modified
    assert convert.log.notices == []
    assert count(gm, aten.special_zeta.default) == 1
