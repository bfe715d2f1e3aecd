"""The lowerings for an NVIDIA GPU, in their order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from passes.base import Pass
from passes.lower.cuda.attention import AttentionToSdpa
from passes.lower.cuda.block_mm import BlockLinearsToScaledMm
from passes.lower.cuda.convolutions import ConvolutionsInHalfPrecision
from passes.lower.cuda.experts import ExpertsToScaledMm
from passes.lower.cuda.half_linears import LinearsInHalfPrecision
from passes.lower.cuda.nvfp4_mm import Nvfp4LinearsToScaledMm
from passes.lower.cuda.scaled_mm import LinearsToScaledMm
from passes.lower.device import Device
from passes.lower.fp4_codes import SpellOutFp4Codes
from passes.lower.fp4_weights import DecodeFp4Weights
from passes.lower.int_mm import LinearsToIntMm


def cuda_pipeline(device: Device, *, fast_accumulation: bool = True) -> tuple[Callable[[], Pass], ...]:
    """What torch itself runs fast on `device`, a CUDA device.

    Args:
        fast_accumulation: let Hopper add FP8 products in fewer digits, as inference libraries do.
    """
    return (
        partial(LinearsToScaledMm, device, fast_accumulation=fast_accumulation),
        partial(BlockLinearsToScaledMm, device),
        partial(Nvfp4LinearsToScaledMm, device),
        partial(LinearsToIntMm, device),
        partial(ExpertsToScaledMm, device, fast_accumulation=fast_accumulation),
        partial(LinearsInHalfPrecision, device),
        partial(ConvolutionsInHalfPrecision, device),
        DecodeFp4Weights,
        SpellOutFp4Codes,
        AttentionToSdpa,
    )
