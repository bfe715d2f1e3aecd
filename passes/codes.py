"""Codes and scales of a weight, some rows at a time: the one round-to-nearest.

What stores weights as codes, in a graph or in a checkpoint, does it here, so that both have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from passes.formats import Format
from passes.ir import dequantize, dynamic_quantize, quantize

__all__ = ["Rows", "rows_together", "write_codes"]

Rows = Iterable[tuple[slice, torch.Tensor]]
"""Which rows (of the first axis), and their values; each piece but the last has a multiple of `rows_together`."""


def rows_together(fmt: Format, ndim: int) -> int:
    """How many rows of the first axis of a weight share scales; those of experts `[E, N, K]` never do."""
    return fmt.sizes[0] if len(fmt.sizes) == ndim else 1


def write_codes(
    rows: Rows,
    fmt: Format,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    block_scales: torch.Tensor | None = None,
    *,
    chosen: bool = False,
) -> None:
    """Round a weight to the nearest codes.

    Args:
        rows: of the weight. codes: to be filled in.
        scale: for the tensor or for each channel; for a format of two levels the global one; None for one whose blocks
            have plain numbers.
        block_scales: for a format with blocks, those of the blocks: to be filled in with what the blocks measure, or
            read if they were `chosen`.
    """
    together = rows_together(fmt, codes.ndim)
    for part, values in rows:
        if not fmt.sizes:
            assert scale is not None
            own = scale[part] if scale.ndim and scale.shape[0] > 1 else scale
            codes[part] = quantize(values, own, format=fmt.name)
            continue
        assert block_scales is not None
        blocks = slice(part.start // together, -(-part.stop // together))
        if chosen:
            codes[part] = quantize(values, block_scale_numbers(block_scales[blocks], scale, fmt), format=fmt.name)
        else:
            codes[part], block_scales[blocks] = dynamic_quantize(values, scale, format=fmt.name)


def block_scale_numbers(block_scales: torch.Tensor, scale: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """The scales of blocks in fp32: of two levels they are codes themselves, under the global `scale`."""
    if fmt.scale is None:
        return block_scales
    assert scale is not None
    return dequantize(block_scales, scale, format=fmt.scale.name, dtype=torch.float32)
