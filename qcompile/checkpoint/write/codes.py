"""Codes and scales of weights that are read a few rows at a time, with the arithmetic of `passes.codes`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from passes.codes import rows_together, write_codes
from passes.formats import Format
from passes.quantize.insert import Quantizer, check_chosen
from qcompile.checkpoint.files.tensors import FLOATS, Stored
from qcompile.errors import CheckpointError
from qcompile.schemes.layer import QuantizedWeight, Scheme

_CHUNK = 1 << 20  # elements; intermediates of four times as many leave the caches, and NVFP4 takes twice the time
Advance = Callable[[int], None]
"""Told how many bytes were read."""


def largest_magnitude(tensor: Stored) -> torch.Tensor:
    """fp32 scalar; raises `CheckpointError` for a tensor that is no float, or holds NaN or infinity."""
    found = torch.zeros(())
    for _, values in pieces(tensor):
        found = torch.maximum(found, _amax(values, tensor))
    return found


def quantize_weight(tensor: Stored, scheme: Scheme, quantizer: Quantizer, advance: Advance) -> QuantizedWeight:
    """The codes of a weight `[N, K]`.

    Args:
        quantizer: its scales, perhaps those of its blocks, and its codes if an algorithm chose them.
        advance: called with the bytes that were read.

    Raises:
        CheckpointError: the tensor is no float, or holds NaN or infinity.
    """
    fmt, (rows, columns) = scheme.weight, tensor.shape
    check_chosen(quantizer, tensor.where, "weight", tensor.shape)
    codes, block_scales = quantizer.codes, quantizer.block_scales
    if codes is None:
        chosen = block_scales is not None
        codes = torch.empty((rows, columns // 2 if fmt.packed else columns), dtype=fmt.storage)
        block_scales = block_scales if chosen else _blocks(fmt, rows, columns)
        checked = _checked(tensor, rows_together(fmt, 2) if fmt.sizes else 1, advance)
        write_codes(checked, fmt, codes, quantizer.scale, block_scales, chosen=chosen)
    else:
        advance(tensor.nbytes)
    if fmt.scale is not None:
        assert block_scales is not None
        return QuantizedWeight(scheme, codes, block_scales, global_scale=quantizer.scale)
    stored = block_scales if fmt.sizes else quantizer.scale
    assert stored is not None
    if fmt.rounds_scales and tensor.dtype.itemsize == 2:
        stored = stored.to(tensor.dtype)  # as the operand has rounded them
    return QuantizedWeight(scheme, codes, stored)


def weight_like(scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """A weight `[N, K] = shape` without values, on the meta device."""
    fmt, (rows, columns) = scheme.weight, shape
    with torch.device("meta"):
        codes = torch.empty((rows, columns // 2 if fmt.packed else columns), dtype=fmt.storage)
        scale, one = _room(fmt, scheme, rows, columns), torch.empty(())
        return QuantizedWeight(
            scheme,
            codes,
            one if scale is None else scale,
            one if fmt.scale is not None else None,
            one if scheme.has_input_scale else None,
        )


def _room(fmt: Format, scheme: Scheme, rows: int, columns: int) -> torch.Tensor | None:
    """For the scales of the blocks or channels; None where the tensor has one."""
    if fmt.sizes:
        return _blocks(fmt, rows, columns)
    return torch.empty((rows, 1)) if scheme.per_channel else None


def _blocks(fmt: Format, rows: int, columns: int) -> torch.Tensor | None:
    if not fmt.sizes:
        return None
    shape = (rows, *fmt.blocks((columns,))) if len(fmt.sizes) == 1 else tuple(fmt.blocks((rows, columns)))
    return torch.empty(shape, dtype=fmt.scale.storage if fmt.scale else torch.float32)


def pieces(tensor: Stored, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
    """A matrix some rows at a time: (which, values); `multiple` rows belong together."""
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{tensor.where} is {tensor.dtype}: a weight to quantize is float16, bfloat16 or float32")
    rows, columns = tensor.shape
    step = max(1, _CHUNK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, tensor.rows(part.start, part.stop)


def _checked(tensor: Stored, multiple: int, advance: Advance) -> Iterator[tuple[slice, torch.Tensor]]:
    """`pieces` that are written: told to `advance`, and finite."""
    for part, values in pieces(tensor, multiple):
        _amax(values, tensor)
        yield part, values
        advance(values.nbytes)


def _amax(values: torch.Tensor, tensor: Stored) -> torch.Tensor:
    low, high = torch.aminmax(values)  # which carries a NaN on
    largest = torch.maximum(-low, high).float()
    if not bool(torch.isfinite(largest)):
        raise broken(tensor)
    return largest


def broken(tensor: Stored) -> CheckpointError:
    """What to say of a weight that is not finite."""
    return CheckpointError(f"{tensor.where} holds NaN or infinity, which cannot be quantized: repair the checkpoint")
