"""Codes of four bits, two in a byte: the one with the even index in the low half."""

from __future__ import annotations

import torch

__all__ = ["decode_int4", "encode_int4", "pack", "unpack"]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """`[..., 2 n]` codes below 16, uint8 -> `[..., n]` bytes."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 2 n]` codes below 16, uint8."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def encode_int4(scaled: torch.Tensor) -> torch.Tensor:
    """`[..., 2 n]` fp32 values in units of the scale -> `[..., n]` bytes: the nearest of -8 to 7, ties to even."""
    return pack(scaled.clamp(-8, 7).round().to(torch.int8).view(torch.uint8) & 15)


def decode_int4(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 2 n]` int8, -8 to 7."""
    return (unpack(codes) ^ 8).view(torch.int8) - 8
