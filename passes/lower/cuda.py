"""The lowerings for an NVIDIA GPU, in their order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from passes.base import Pass
from passes.lower.attention import AttentionToSdpa
from passes.lower.block_mm import BlockLinearsToScaledMm
from passes.lower.device import Device
from passes.lower.experts import ExpertsToScaledMm
from passes.lower.fp4_codes import SpellOutFp4Codes
from passes.lower.fp4_weights import DecodeFp4Weights
from passes.lower.half_linears import LinearsInHalfPrecision
from passes.lower.int_mm import LinearsToIntMm
from passes.lower.nvfp4_mm import Nvfp4LinearsToScaledMm
from passes.lower.scaled_mm import LinearsToScaledMm


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
        DecodeFp4Weights,
        SpellOutFp4Codes,
        AttentionToSdpa,
    )
