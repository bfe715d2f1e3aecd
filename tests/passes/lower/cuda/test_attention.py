"""Quantized attention in half precision: torch's own attention on the operands before they were quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.lower.cuda.attention import AttentionToSdpa
from passes.lower.kernels import kernels
from passes.place.attention_scale import PlaceAttentionScale
from passes.quantize.sites import find_sites
from passes.sdpa import SDPA
from passes.sdpa import Attention as Arguments
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, run
from tests.passes.lower.cuda.support import trace
from tests.passes.support import Attention, insert

S = torch.tensor(0.02)


def fused(module: nn.Module, *inputs: Any, fuse: bool = True, **options: Any) -> tuple[GraphModule, GraphModule]:
    """The graph with quantized attention, and the one before."""
    before, gm = (graph_of(module, *inputs, **options) for _ in range(2))
    attentions = {site.consumer for site in find_sites(gm) if site.operand == "q"}
    if fuse:
        PlaceAttentionScale(attentions)(gm)
    insert(gm, {"q": S, "k": S, "v": S})
    if fuse:
        assert FuseAttentionQdq()(gm).modified
    return gm, before


def check(gm: GraphModule, before: GraphModule, *inputs: Any, fired: int = 1) -> None:
    quantized = run(gm, *inputs)
    first = AttentionToSdpa()
    assert first(gm).modified and first.log.fired[first.name] == fired
    got = run(gm, *inputs)
    torch.testing.assert_close(got, run(before, *inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, quantized, rtol=0.3, atol=0.1)
    code = gm.code
    assert not AttentionToSdpa()(gm).modified and gm.code == code


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("causal", "kv_heads", "scale", "fuse"),
    [
        (False, 4, None, True),
        (True, 4, 0.3, True),
        (True, 2, None, True),
        (False, 1, 0.3, True),
        (False, 4, None, False),
        (True, 2, 0.3, False),
    ],
)
def test_it_is_the_attention_before(causal: bool, kv_heads: int, scale: float | None, fuse: bool) -> None:
    module = Attention(4, 8, kv_heads, scale=scale, is_causal=causal)
    shapes = {"x": {0: DYNAMIC, 1: DYNAMIC}, "mask": None}
    gm, before = fused(module, torch.randn(2, 5, 32), None, fuse=fuse, dynamic_shapes=shapes)
    check(gm, before, torch.randn(3, 7, 32), None)
    assert (count(gm, ATTENTION), count(gm, SDPA), count(gm, QUANTIZE, DEQUANTIZE)) == (0, 1, 0)
    assert count(gm, aten.mul.Tensor) == 0, "the factor is back in the operator"
    arguments = Arguments.of(only_call(gm, SDPA))
    assert arguments.enable_gqa == (kv_heads != 4) and arguments.is_causal == causal
    assert arguments.scale == pytest.approx(8**-0.5 if scale is None else scale)
    (kernel,) = kernels(gm)
    assert kernel.kernel == "scaled_dot_product_attention" and "not quantized" in kernel.dropped
    trace(gm, torch.randn(3, 7, 32), None)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind: str) -> None:
    x, keep = torch.randn(2, 5, 16), torch.rand(1, 1, 5, 5) < 0.5
    keep[..., 0] = True
    mask = keep if kind == "bool" else torch.randn(1, 1, 5, 5)
    gm, before = fused(Attention(), x, mask)
    check(gm, before, x, mask)


def test_half_precision() -> None:
    x = torch.randn(2, 5, 16).half()
    gm, before = fused(Attention().half(), x, None)
    quantized = run(gm, x, None)
    AttentionToSdpa()(gm)
    (got,) = run(gm, x, None)
    torch.testing.assert_close(got, run(before, x, None)[0], rtol=1e-2, atol=1e-2)
    assert got.dtype == torch.half and float((got - quantized[0]).abs().max()) < 0.2


def test_operands_that_were_dequantized_to_another_dtype() -> None:
    x = torch.randn(1, 2, 5, 8).half()
    gm, emit, (node, scale) = blank(x, S)
    codes = emit(QUANTIZE, node, scale, format="fp8")
    operand = emit(DEQUANTIZE, codes, scale, format="fp8", dtype=torch.float32)
    AttentionToSdpa()(returns(gm, emit(SDPA, operand, operand, operand)))
    (got,) = run(gm, x, S)
    torch.testing.assert_close(got, scaled_dot_product_attention(x.float(), x.float(), x.float()))


class SharedKey(nn.Module):
    """Two attentions share k, which a sine reads as well."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        y = scaled_dot_product_attention(q, k, k, scale=1.0)
        return scaled_dot_product_attention(y, k, k, scale=1.0), k.sin()


def test_another_user_keeps_the_dequantized_tensor() -> None:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    gm, before = fused(SharedKey(), q, k)
    (sine,) = (node for node in gm.graph.nodes if node.target is aten.sin.default)
    pair = next(node for node in gm.graph.nodes if node.target is DEQUANTIZE and "k" in str(node.args[0].args[0]))
    sine.args = (pair,)
    quantized = run(gm, q, k)[1]
    AttentionToSdpa()(gm)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE), count(gm, SDPA)) == (1, 1, 2)
    got = run(gm, q, k)
    assert torch.equal(got[1], quantized)
    torch.testing.assert_close(got[0], run(before, q, k)[0], rtol=1e-5, atol=1e-5)


def test_declines_a_mask_that_is_causal_too() -> None:
    gm, _ = fused(Attention(), torch.randn(2, 5, 16), torch.randn(1, 1, 5, 5))
    only_call(gm, ATTENTION).update_kwarg("is_causal", True)
    gm.recompile()
    assert declines(AttentionToSdpa, gm) == ["torch's attention takes no mask where it is causal"]


def test_attention_that_is_not_quantized_stays() -> None:
    assert declines(AttentionToSdpa, graph_of(Attention(), torch.randn(2, 5, 16), None)) == []
