"""FP4 (e2m1), two codes in a byte: the one with the even index in the low nibble."""

from __future__ import annotations

import torch

from passes.nibbles import pack, unpack

__all__ = ["decode", "encode"]

_BITS_OF_2_22 = 0x4A800000
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def encode(scaled: torch.Tensor) -> torch.Tensor:
    """`[..., 2 n]` fp32 values in units of the scale -> `[..., n]` bytes."""
    return pack(_codes(scaled))


def decode(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 2 n]` fp32 values in units of the scale."""
    values = torch.tensor(_E2M1, device=codes.device, dtype=torch.float32)  # made here: this is traced, too
    return values[unpack(codes).int()]


def _codes(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> 4-bit codes: sign, two bits of exponent, one of mantissa; ties to even, 6 and more to 6.

    It works on the bits of a float, which takes a fourth of the time of quotients: below 1 codes are multiples of 0.5,
    the distance of two floats above 2^22, so adding that rounds; from 1 on a code is the exponent and the first bit of
    the mantissa.
    """
    size = x.abs().clamp_(max=6)
    bits = size.view(torch.int32)
    below_one = (size + 2.0**22).view(torch.int32).sub_(_BITS_OF_2_22)
    to_even = (bits >> 22).bitwise_and_(1)
    above = to_even.add_(bits).add_((1 << 21) - 1).bitwise_right_shift_(22).sub_((127 << 1) - 2)
    codes = torch.where(size < 1, below_one, above).to(torch.uint8)
    # not the bit of -0.0: Model Optimizer writes that as 0, too
    return codes.bitwise_or_((x < 0).to(torch.uint8) << 3)
