"""SDPA of quantized operands becomes the one attention whose probabilities are quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.constants import constant
from passes.formats import FP8, FP8_PER_TOKEN, INT8
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten
from passes.ir import ATTENTION
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Attention, insert

S = torch.tensor(0.02)
ALL = {"q": S, "k": S, "v": S}
NEAR = {"rtol": 0.0, "atol": 0.15}  # of the probabilities, at most 1/16 is lost


def quantized(*inputs: Tensor | None, dynamic: bool = False, **options: object) -> GraphModule:
    shapes = {"x": {0: DYNAMIC, 1: DYNAMIC}, "mask": None} if dynamic else None
    gm = graph_of(Attention(2, 8, **{"scale": 1.0, **options}), *inputs, dynamic_shapes=shapes)  # type: ignore[arg-type]
    insert(gm, ALL)
    return gm


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"kv_heads": 1}], ids=["plain", "causal", "grouped"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_fires_and_stays_near(options: dict[str, object], dynamic: bool) -> None:
    gm = quantized(torch.randn(2, 5, 16), None, dynamic=dynamic, **options)
    rewrites(FuseAttentionQdq, gm, torch.randn(2, 7 if dynamic else 5, 16), None, **NEAR)
    assert (count(gm, SDPA), count(gm, ATTENTION)) == (0, 1)
    node = only_call(gm, ATTENTION)
    assert constant(gm, node.args[4]) == torch.tensor(1 / 448)
    assert node.kwargs == {"is_causal": bool(options.get("is_causal")), "format": "fp8"}


def test_int8_has_a_scale_of_its_own() -> None:
    gm = graph_of(Attention(scale=1.0), torch.randn(1, 3, 16))
    insert(gm, ALL, INT8)
    rewrites(FuseAttentionQdq, gm, torch.randn(1, 3, 16), **NEAR)
    assert constant(gm, only_call(gm, ATTENTION).args[4]) == torch.tensor(1 / 127)


def test_a_calibrated_scale_is_taken() -> None:
    gm = quantized(torch.randn(1, 3, 16))
    instance = FuseAttentionQdq({only_call(gm, SDPA): torch.tensor(2.0**-9)})
    assert instance(gm).modified
    assert constant(gm, only_call(gm, ATTENTION).args[4]) == 2.0**-9


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_added(kind: str) -> None:
    x, keep = torch.randn(1, 4, 16), torch.rand(1, 1, 4, 4) < 0.6
    keep[..., 0] = True
    mask = keep if kind == "bool" else torch.where(keep, 0.0, -1e4)
    gm = quantized(x, mask)
    rewrites(FuseAttentionQdq, gm, x, mask, **NEAR)
    assert count(gm, aten.where.self) == (kind == "bool")


def test_a_row_that_is_masked_as_a_whole_is_finite() -> None:
    x, mask = torch.randn(1, 4, 16), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(-1)
    gm = quantized(x, mask)
    FuseAttentionQdq()(gm)
    (out,) = run(gm, x, mask)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_score_added_to_a_mask_does_not_become_infinite(dtype: torch.dtype) -> None:
    """The lowest float16 and a score of -512 are -inf: a row that is masked as a whole would be NaN."""
    q, k, v = torch.full((1, 1, 3, 8), 8.0), torch.full((1, 1, 3, 8), -8.0), torch.randn(1, 1, 3, 8)
    inputs = *(t.to(dtype) for t in (q, k, v)), torch.zeros(3, 3, dtype=torch.bool)
    gm = graph_of(Masked(), *inputs)
    insert(gm, ALL)
    FuseAttentionQdq()(gm)
    (out,) = run(gm, *inputs)
    torch.testing.assert_close(out, inputs[2].mean(2, keepdim=True).expand_as(out), rtol=0, atol=0.3)


class Masked(nn.Module):
    """Attention of inputs, with a mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, scale=1.0)


class SharedMask(nn.Module):
    """Two attentions with one mask, which is returned too."""

    def forward(self, q: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = scaled_dot_product_attention(q, q, q, mask, scale=1.0)
        return scaled_dot_product_attention(y, y, y, mask, scale=1.0), mask, y.sin(), q


def test_the_additive_mask_is_made_once_and_other_users_keep_theirs() -> None:
    q, mask = torch.randn(1, 2, 3, 8), torch.ones(3, 3, dtype=torch.bool).tril()
    gm = graph_of(SharedMask(), q, mask)
    insert(gm, ALL)
    rewrites(FuseAttentionQdq, gm, q, mask, fired=2, rtol=0, atol=0.3)
    assert (count(gm, aten.where.self), count(gm, ATTENTION)) == (1, 2)
    out = run(gm, q, mask)
    assert torch.equal(out[1], mask)
    assert torch.equal(out[3], q)


class Bare(nn.Module):
    """Attention of inputs, with an option."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, **{"scale": 1.0, **self.options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "shape", "operands", "reason"),
    [
        ({}, (1, 2, 3, 8), "q", "k and v of this attention is not quantized"),
        ({}, (1, 2, 3, 8), "qk", "v of this attention is not quantized"),
        ({"scale": None}, (1, 2, 3, 8), "qkv", "the attention scale is not applied to q before its quantizer"),
        ({"dropout_p": 0.1}, (1, 2, 3, 8), "qkv", "this attention draws dropout"),
        ({}, (2, 3, 8), "qkv", "q has 3 axes instead of batch, heads, length and width"),
    ],
)
def test_what_cannot_be_fused_is_declined(
    options: dict[str, object], shape: tuple[int, ...], operands: str, reason: str
) -> None:
    gm = graph_of(Bare(**options), *(torch.randn(shape) for _ in range(3)))
    insert(gm, {operand: S for operand in operands})
    assert declines(FuseAttentionQdq, gm) == [reason]


def test_different_formats_and_measured_scales_are_declined() -> None:
    inputs = tuple(torch.randn(1, 2, 3, 8) for _ in range(3))
    for fmt, scale, reason in (
        (INT8, S, "different formats: fp8, fp8, int8"),
        (FP8_PER_TOKEN, None, "v is not quantized with"),
    ):
        gm = graph_of(Bare(), *inputs)
        own = {"v": Quantizer(fmt, scale)}
        InsertQdq({s: own.get(s.operand, Quantizer(FP8, S)) for s in find_sites(gm) if s.operand in "qkv"})(gm)
        (found,) = declines(FuseAttentionQdq, gm)
        assert reason in found


def test_learned_keys_are_operands_like_others() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.randn(1, 2, 3, 8))

        def forward(self, q: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, self.k, q, scale=1.0)

    q = torch.randn(1, 2, 3, 8)
    gm = graph_of(Memory(), q)
    insert(gm, ALL)
    rewrites(FuseAttentionQdq, gm, q, rtol=0.0, atol=0.05)


def test_a_softmax_quantizer_that_is_off_is_declined_and_float_attention_is_not_mentioned() -> None:
    gm = quantized(torch.randn(1, 3, 16))
    (reason,) = declines(lambda: FuseAttentionQdq({}), gm)
    assert "softmax quantizer is off" in reason
    assert declines(FuseAttentionQdq, graph_of(Attention(scale=1.0), torch.randn(1, 3, 16))) == []
