"""What quantizers make of numbers, without codes: for algorithms that try many."""

from __future__ import annotations

import torch

from passes.ir import block_numbers, block_scale_values
from qcompile.algorithms.scales import scale_of
from qcompile.schemes.config import QuantizerConfig, format_of

__all__ = ["rounded"]


def rounded(x: torch.Tensor, config: QuantizerConfig, amax: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """`dequantize(quantize(x))` in float32 for `x` `[M, K]`, float32.

    Args:
        amax: the largest magnitude that the constant scale is for, of the tensor or of each row `[M, 1]`; scales that
            are measured are measured on `x`.
    """
    fmt = format_of(config)
    if fmt.sizes:
        unit = scale_of(amax, config, power_of_two)
        if fmt.scale is not None:
            scale = fmt.scale.nearest(block_scale_values(x, unit, fmt)) * unit
        else:
            scale = block_numbers(x, fmt)
        width = fmt.sizes[-1]
        if len(fmt.sizes) == 1 and x.shape[-1] % width == 0:
            blocks = x.reshape(*x.shape[:-1], -1, width)
            return _nearest(blocks, scale.unsqueeze(-1), config).flatten(-2)
        return _nearest(x, fmt.per_element(scale, x.shape), config)
    if config.dynamic:
        per_row = config.granularity == "per_token"
        amax = x.abs().amax(-1, keepdim=True) if per_row else x.abs().amax()
        return _nearest(x, amax / fmt.max, config)
    return _nearest(x, scale_of(amax, config, power_of_two), config)


def _nearest(x: torch.Tensor, scale: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    scale = torch.where(scale == 0, 1.0, scale)  # of zeros alone
    return format_of(config).nearest(x / scale).mul_(scale)
