"""Quantization formats: one frozen value object each, never a string test scattered through the code.

What a format is needs no torch, whose import takes seconds, and recipes are read without it; what encodes and decodes
imports it where it is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from passes.errors import PassError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Format:
    """A number format that tensors are quantized to.

    Attributes:
        name: what recipes, the `format` argument of the IR operators and reports call it.
        storage_name: what torch calls the dtype that holds the codes.
        max: largest magnitude of a code; `amax / max` is the scale of what has the largest magnitude `amax`.
        min: most negative code, -`max` unless the format has one more on that side.
        integer: codes are integers, so they are rounded (ties to even) before the cast.
        packed: two codes share a byte, the one with the even index in the low nibble.
        block: how many elements of each of the last axes share a scale, where the format says so: `(16,)`, `(128,
            128)`; `(None,)` is the whole axis, and `()` leaves it to the shape of the scale, which broadcasts. The last
            block of an axis can be smaller, but in a packed format.
        scale: the format that the scales of blocks are stored in, under one float32 global scale for the tensor; None
            for scales that are plain numbers.
        rounds_scales: those plain numbers are in the dtype that the program computes in, as kernels read them; others
            are float32.
        powers: those plain numbers are powers of two, stored as exponents (e8m0) in checkpoints, and blocks are whole.
        codes_of: the format whose codes these are, where only what shares a scale is another.
    """

    name: str
    storage_name: str
    max: float
    min: float
    integer: bool = False
    packed: bool = False
    block: tuple[int | None, ...] = ()
    scale: Format | None = None
    rounds_scales: bool = False
    powers: bool = False
    codes_of: str = ""

    def shared_by(self, name: str, block: tuple[int | None, ...]) -> Format:
        """The same codes with a scale for each such `block`."""
        return replace(self, name=name, block=block, codes_of=self.family)

    @property
    def family(self) -> str:
        """What recipes call the format, and what hardware has arithmetic for: what shares a scale is said apart."""
        return self.codes_of or self.name

    @property
    def is_fp4(self) -> bool:
        """Whether it is e2m1, two codes to a byte, under scales of two levels, which kernels multiply."""
        return self.packed and self.scale is not None

    @property
    def whole_blocks(self) -> bool:
        """Whether the last block of a row is as long as the others."""
        return self.packed or self.powers

    @property
    def storage(self) -> torch.dtype:
        """The dtype that holds the codes."""
        import torch

        found: torch.dtype = getattr(torch, self.storage_name)
        return found

    @property
    def global_max(self) -> float:
        """`amax / global_max` is the one constant scale of a tensor: the global one where there are two levels."""
        return self.max * self.scale.max if self.scale else self.max

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """fp32 values in units of the scale -> codes. Saturates; a NaN stays NaN where the format has one.

        torch 2.11 turns an overflow of e4m3fn into NaN and 2.13 saturates, so the clamp comes first on both.
        """
        if self.packed:
            from passes import e2m1, nibbles

            return nibbles.encode_int4(scaled) if self.integer else e2m1.encode(scaled)
        clamped = scaled.clamp(self.min, self.max)
        return (clamped.round() if self.integer else clamped).to(self.storage)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes -> fp32 values in units of the scale."""
        if not self.packed:
            return codes.float()
        from passes import e2m1, nibbles

        return nibbles.decode_int4(codes).float() if self.integer else e2m1.decode(codes)

    @property
    def element_bytes(self) -> float:
        """What an element of a tensor takes in a file, with the scales of blocks that are codes themselves."""
        scales = self.scale.storage.itemsize / math.prod(self.sizes) if self.scale else 0.0
        return self.storage.itemsize / (2 if self.packed else 1) + scales

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """`decode(encode(scaled))`, the fp32 number next to each that the format has, without the codes.

        A zero is positive. It takes a tenth of the time of a cast to FP8 and back, for who tries many scales.
        """
        import torch

        clamped = scaled.clamp(self.min, self.max)
        if self.integer:
            return clamped.round_()
        eps, least = 0.5, 1.0
        if not self.packed:
            limits = torch.finfo(self.storage)
            eps, least = limits.eps, limits.smallest_normal
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
        import torch

        for axis, size in enumerate(self.sizes, -len(self.sizes)):
            if size == 1:
                continue
            if shape[axis] % size == 0:
                scale = scale.repeat_interleave(size, axis)
            else:
                block = torch.arange(shape[axis], device=scale.device, dtype=torch.float64) / size
                scale = scale.index_select(axis, block.long())
        return scale


FP8 = Format("fp8", "float8_e4m3fn", 448.0, -448.0)
FP8_PER_TOKEN = FP8.shared_by("fp8_per_token", (None,))
FP8_1X128 = FP8.shared_by("fp8_1x128", (128,))
FP8_128X128 = FP8.shared_by("fp8_128x128", (128, 128))
INT8 = Format("int8", "int8", 127.0, -128.0, integer=True)
INT8_PER_TOKEN = INT8.shared_by("int8_per_token", (None,))
NVFP4 = Format("nvfp4", "uint8", 6.0, -6.0, packed=True, block=(16,), scale=FP8)
MXFP8 = Format("mxfp8", "float8_e4m3fn", 448.0, -448.0, block=(32,), powers=True)
MXFP4 = Format("mxfp4", "uint8", 6.0, -6.0, packed=True, block=(32,), powers=True)
_INT4 = Format("int4", "uint8", 7.0, -8.0, integer=True, packed=True, rounds_scales=True)
INT4_32, INT4_64, INT4_128 = (_INT4.shared_by(f"int4_{size}", (size,)) for size in (32, 64, 128))
INT4_GROUPS = {fmt.sizes[-1]: fmt for fmt in (INT4_32, INT4_64, INT4_128)}
"""Weights `[N, K]` with a scale for each group of so many elements of a row."""
INT4_COLUMNS = {
    size: replace(INT4_32, name=f"int4_{size}x1", storage_name="int8", packed=False, block=(size, 1))
    for size in (16, 32, 64, 128)
}
"""The same as ONNX's MatMul wants it: `[K, N]`, groups along K, a byte for each code until the file is written. Of 16
is what one group of 32 is cut into."""

FORMATS = {
    f.name: f
    for f in (
        *(FP8, FP8_PER_TOKEN, FP8_1X128, FP8_128X128, INT8, INT8_PER_TOKEN, NVFP4, MXFP8, MXFP4),
        *INT4_GROUPS.values(),
        *INT4_COLUMNS.values(),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`. Raises `PassError` for a name that the IR does not carry."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PassError(f"unknown quantization format {name!r}; known: {', '.join(FORMATS)}") from None
