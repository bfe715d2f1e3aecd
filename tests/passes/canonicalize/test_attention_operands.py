"""Quantizers that sit before the rearrangement of an attention's operands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.canonicalize.attention_operands import MoveQuantizersToAttention
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, declines, graph_of, only_call, rewrites


class Packed(nn.Module):
    """Keys are quantized as `[B, S, H * D]`, and another reader wants them so."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        keys = DEQUANTIZE(QUANTIZE(k, self.scale, format="fp8"), self.scale, format="fp8", dtype=k.dtype)
        heads = keys.reshape(k.shape[0], k.shape[1], 2, 8).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, heads, heads), keys.sin()


def test_the_pair_moves_behind_reshape_and_transpose() -> None:
    gm = graph_of(
        Packed(torch.tensor(0.01)), torch.randn(2, 2, 6, 8), torch.randn(2, 6, 16),
        dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}),
    )  # fmt: skip
    for target in (QUANTIZE, DEQUANTIZE):
        only_call(gm, target).meta["custom"] = {"quantizer": "k_quantizer"}
    rewrites(MoveQuantizersToAttention, gm, torch.randn(3, 2, 5, 8), torch.randn(3, 5, 16), fired=2)
    attention = only_call(gm, SDPA)
    for operand in attention.args[1:3]:
        assert operand.target is DEQUANTIZE and operand.args[0].target is QUANTIZE
        assert operand.meta["custom"] == operand.args[0].meta["custom"] == {"quantizer": "k_quantizer"}


def test_a_scale_for_each_channel_stays() -> None:
    gm = graph_of(Packed(torch.full((16,), 0.01)), torch.randn(2, 2, 6, 8), torch.randn(2, 6, 16))
    assert declines(MoveQuantizersToAttention, gm) == []


class Stored(Packed):
    """Keys that are stored as codes."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:  # type: ignore[override]
        heads = DEQUANTIZE(self.codes, self.scale, format="fp8", dtype=q.dtype).view(1, 6, 2, 8).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, heads, k)


def test_codes_that_nothing_quantizes_stay() -> None:
    module = Stored(torch.tensor(0.01))
    module.register_buffer("codes", torch.randn(1, 6, 16).to(torch.float8_e4m3fn))
    gm = graph_of(module, torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    assert declines(MoveQuantizersToAttention, gm) == []
