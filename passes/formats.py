"""Quantization formats: one frozen value object each, never a string test scattered through the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import PassError


@dataclass(frozen=True)
class Format:
    """A number format that tensors are quantized to.

    Attributes:
        name: what recipes, the `format` argument of the IR operators and reports call it.
        storage: the torch dtype that holds the codes.
        max: largest magnitude of a code; `amax / max` is the scale of what has the largest magnitude `amax`.
        min: most negative code, -`max` unless the format has one more on that side.
        integer: codes are integers, so they are rounded (ties to even) before the cast.
        packed: two codes share a byte, the one with the even index in the low nibble.
        block: how many elements of each of the last axes share a scale, where the format says so: `(16,)`, `(128,
            128)`; `(None,)` is the whole axis, and `()` leaves it to the shape of the scale, which broadcasts. The last
            block of an axis can be smaller, but in a packed format.
        scale: the format that the scales of blocks are stored in, under one float32 global scale for the tensor; None
            for scales that are plain numbers.
    """

    name: str
    storage: torch.dtype
    max: float
    min: float
    integer: bool = False
    packed: bool = False
    block: tuple[int | None, ...] = ()
    scale: Format | None = None

    @property
    def global_max(self) -> float:
        """`amax / global_max` is the one constant scale of a tensor: the global one where there are two levels."""
        return self.max * self.scale.max if self.scale else self.max

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """fp32 values in units of the scale -> codes. Saturates; a NaN stays NaN where the format has one.

        torch 2.11 turns an overflow of e4m3fn into NaN and 2.13 saturates, so the clamp comes first on both.
        """
        if self.packed:
            return _pack(_encode_e2m1(scaled))
        clamped = scaled.clamp(self.min, self.max)
        return (clamped.round() if self.integer else clamped).to(self.storage)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes -> fp32 values in units of the scale."""
        if not self.packed:
            return codes.float()
        values = torch.tensor(_E2M1, device=codes.device, dtype=torch.float32)  # made here: this is traced, too
        return values[_unpack(codes).int()]

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """`decode(encode(scaled))`, the fp32 number next to each that the format has, without the codes.

        A zero is positive. It takes a tenth of the time of a cast to FP8 and back, for who tries many scales.
        """
        clamped = scaled.clamp(self.min, self.max)
        if self.integer:
            return clamped.round_()
        eps, least = (0.5, 1.0) if self.packed else (torch.finfo(self.storage).eps, _least_normal(self.storage))
        # numbers lie `eps` times the power of two below them apart, and floats above 1.5 * 2^23 of that do, too
        apart = clamped.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        apart.clamp_(min=least).mul_(1.5 * 2.0**23 * eps)
        return clamped.add_(apart).sub_(apart)

    @property
    def sizes(self) -> tuple[int, ...]:
        """`block` where it is a number of elements; `()` for scales that broadcast."""
        return tuple(size for size in self.block if size is not None)

    def blocks(self, shape: Sequence[Any]) -> list[Any]:
        """How many blocks a tensor of `shape` has along each axis that has some; dimensions may be symbolic."""
        return [(length + size - 1) // size for length, size in zip(shape[-len(self.sizes) :], self.sizes, strict=True)]

    def per_element(self, scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """`scale` with one value for each element of a tensor of `shape`, if it has one for each block.

        Where a block is cut, by an index that is no integer division: at that, Inductor 2.11 and 2.13 split a loop for
        a CPU, and leave out what is behind the last whole block.
        """
        for axis, size in enumerate(self.sizes, -len(self.sizes)):
            if shape[axis] % size == 0:
                scale = scale.repeat_interleave(size, axis)
            else:
                block = torch.arange(shape[axis], device=scale.device, dtype=torch.float64) / size
                scale = scale.index_select(axis, block.long())
        return scale


FP8 = Format("fp8", torch.float8_e4m3fn, 448.0, -448.0)
FP8_PER_TOKEN = Format("fp8_per_token", torch.float8_e4m3fn, 448.0, -448.0, block=(None,))
FP8_1X128 = Format("fp8_1x128", torch.float8_e4m3fn, 448.0, -448.0, block=(128,))
FP8_128X128 = Format("fp8_128x128", torch.float8_e4m3fn, 448.0, -448.0, block=(128, 128))
INT8 = Format("int8", torch.int8, 127.0, -128.0, integer=True)
INT8_PER_TOKEN = Format("int8_per_token", torch.int8, 127.0, -128.0, integer=True, block=(None,))
NVFP4 = Format("nvfp4", torch.uint8, 6.0, -6.0, packed=True, block=(16,), scale=FP8)

FORMATS = {f.name: f for f in (FP8, FP8_PER_TOKEN, FP8_1X128, FP8_128X128, INT8, INT8_PER_TOKEN, NVFP4)}

MULTIPLIED = {
    FP8: (FP8, FP8_PER_TOKEN),
    FP8_128X128: (FP8_1X128,),
    INT8: (INT8, INT8_PER_TOKEN),
    NVFP4: (NVFP4,),
}
"""Format of a weight -> the formats of inputs that some target multiplies it with, as codes."""


def get_format(name: str) -> Format:
    """The format called `name`. Raises `PassError` for a name that the IR does not carry."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PassError(f"unknown quantization format {name!r}; known: {', '.join(FORMATS)}") from None


def _least_normal(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).smallest_normal)


_BITS_OF_2_22 = 0x4A800000
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _encode_e2m1(x: torch.Tensor) -> torch.Tensor:
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


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """`[..., 2 n]` 4-bit codes -> `[..., n]` bytes."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpack(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 2 n]` 4-bit codes."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
