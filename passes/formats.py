"""Quantization formats: one frozen value object each, never a string test scattered through the code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from passes.errors import PassError


@dataclass(frozen=True)
class Format:
    """A number format that tensors are quantized to.

    Attributes:
        name: what recipes, the `format` argument of the IR operators and reports call it.
        storage: the torch dtype that holds the codes.
        max: largest magnitude of a calibrated value; `amax / max` is the scale of a tensor.
        min: most negative code, -`max` unless the format has one more on that side.
        integer: codes are integers, so they are rounded (ties to even) before the cast.
        block: for `dynamic_quantize`, how many elements of each trailing axis share a scale; None is the whole axis,
            `()` the whole tensor. A static scale says it by its own shape.
    """

    name: str
    storage: torch.dtype
    max: float
    min: float
    integer: bool = False
    block: tuple[int | None, ...] = ()

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """fp32 values in units of the scale -> codes. Saturates; a NaN stays NaN where the format has one.

        torch 2.11 turns an overflow of e4m3fn into NaN and 2.13 saturates, so the clamp comes first on both.
        """
        clamped = scaled.clamp(self.min, self.max)
        return (clamped.round() if self.integer else clamped).to(self.storage)


FP8 = Format("fp8", torch.float8_e4m3fn, 448.0, -448.0)
FP8_PER_TOKEN = Format("fp8_per_token", torch.float8_e4m3fn, 448.0, -448.0, block=(None,))
INT8 = Format("int8", torch.int8, 127.0, -128.0, integer=True)

FORMATS = {f.name: f for f in (FP8, FP8_PER_TOKEN, INT8)}


def get_format(name: str) -> Format:
    """The format called `name`. Raises `PassError` for a name that the IR does not carry."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PassError(f"unknown quantization format {name!r}; known: {', '.join(FORMATS)}") from None
