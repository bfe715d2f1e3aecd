"""How a whole layer is quantized: the formats of its weight and of its input, and what of their scales is constant."""

from __future__ import annotations

from dataclasses import dataclass

from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, Format

__all__ = [
    "FP8_BLOCK",
    "FP8_CHANNEL_TOKEN",
    "FP8_TENSOR",
    "INT8_CHANNEL_TOKEN",
    "NVFP4_LOW_RANK",
    "NVFP4_W4A4",
    "Scheme",
]


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantized.

    Attributes:
        weight: format of the weight, one that `passes.capabilities.PRODUCTS` has for a weight.
        input: format of the input, one that it has beside that weight; None for weight-only.
        per_channel: a weight whose format has no blocks has a scale for each row.
        low_rank: a part of the weight is beside the codes in floating point, as the product of two thin matrices.
        measured: the scale of the whole input, a constant otherwise, is measured at run time: that of FP8 and INT8, the
            global one of NVFP4.
    """

    weight: Format
    input: Format | None = None
    per_channel: bool = False
    measured: bool = False
    low_rank: bool = False

    @property
    def has_input_scale(self) -> bool:
        """Whether the input has a constant scale, the global one of a format of two levels."""
        return self.input is not None and not self.measured and (self.input.scale is not None or not self.input.block)


# The schemes that servers and other tools have a name for.
FP8_TENSOR = Scheme(FP8, FP8)
FP8_CHANNEL_TOKEN = Scheme(FP8, FP8_PER_TOKEN, per_channel=True)
FP8_BLOCK = Scheme(FP8_128X128, FP8_1X128)
NVFP4_W4A4 = Scheme(NVFP4, NVFP4)
NVFP4_LOW_RANK = Scheme(NVFP4, NVFP4, low_rank=True)
INT8_CHANNEL_TOKEN = Scheme(INT8, INT8_PER_TOKEN, per_channel=True)
