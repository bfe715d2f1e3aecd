"""Constant scales: which quantizers have one, and what it is for a largest magnitude."""

from __future__ import annotations

import torch

from qcompile.schemes.config import QuantizerConfig, format_of


def has_constant(config: QuantizerConfig) -> bool:
    """Whether the quantizer has a constant scale: NVFP4 has a global one above those of its blocks."""
    fmt = format_of(config)
    return fmt.scale is not None or not (config.dynamic or fmt.sizes)


def is_calibrated(config: QuantizerConfig) -> bool:
    """Whether the constant scale of an activation is that of what calibration sees."""
    return has_constant(config) and config.constant_amax is None


def scale_of(amax: torch.Tensor, config: QuantizerConfig, power_of_two: bool) -> torch.Tensor:
    """amax / max, in float32, its smallest normal number at least; 1 where a tensor is all zeros, and so are its codes.

    For a format of two levels the global scale, with which the scale of the block of the largest magnitude is e4m3's
    largest: amax / (6 * 448) for NVFP4, as Model Optimizer has it.
    """
    scale = amax / format_of(config).global_max
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # below it what divides by the scale, as files of compressed-tensors do, would be infinite
    return torch.where(amax == 0, 1.0, scale.clamp_min(torch.finfo(torch.float32).tiny))
