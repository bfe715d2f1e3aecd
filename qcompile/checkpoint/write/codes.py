"""Codes and scales of weights that are read a few rows at a time, with the arithmetic of `passes.ir`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from passes.formats import Format
from passes.ir import dynamic_quantize, quantize
from qcompile.checkpoint.files.tensors import FLOATS, Stored
from qcompile.errors import CheckpointError
from qcompile.layer import QuantizedWeight, Scheme
from qcompile.recipe import QuantizerConfig
from qcompile.scales import scale_of

_CHUNK = 1 << 20  # elements; intermediates of four times as many leave the caches, and NVFP4 takes twice the time
Advance = Callable[[int], None]
"""Told how many bytes were read."""


def largest_magnitude(tensor: Stored, advance: Advance) -> torch.Tensor:
    """fp32 scalar; raises `CheckpointError` for a tensor that is no float, or holds NaN or infinity."""
    found = torch.zeros(())
    for _, values in _pieces(tensor, 1, advance):
        found = torch.maximum(found, _amax(values, tensor))
    return found


def quantize_weight(
    tensor: Stored,
    scheme: Scheme,
    config: QuantizerConfig,
    power_of_two: bool,
    scale: torch.Tensor | None,
    advance: Advance,
) -> QuantizedWeight:
    """The codes of a weight `[N, K]`.

    Args:
        config: what the recipe says of the weight.
        power_of_two: scales are rounded up to one, as the recipe's calibration says.
        scale: the (global) one of the whole tensor, where the format has one.
        advance: called with the bytes that were read.

    Raises:
        CheckpointError: the tensor is no float, or holds NaN or infinity.
    """
    fmt, (rows, columns) = scheme.weight, tensor.shape
    codes = torch.empty((rows, columns // 2 if fmt.packed else columns), dtype=fmt.storage)
    scales = _room(fmt, scheme, rows, columns)
    high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
    for start, values in _pieces(tensor, high, advance):
        part = slice(start, start + values.shape[0])
        _amax(values, tensor)
        if fmt.sizes:
            assert scales is not None
            blocks = slice(start // high, -(-part.stop // high))
            codes[part], scales[blocks] = dynamic_quantize(values, scale, format=fmt.name)
            continue
        own = scale
        if scales is not None:
            own = scales[part] = scale_of(values.abs().amax(-1, keepdim=True).float(), config, power_of_two)
        assert own is not None
        codes[part] = quantize(values, own, format=fmt.name)
    if fmt.scale is not None:
        assert scales is not None
        return QuantizedWeight(scheme, codes, scales, global_scale=scale)
    stored = scales if scales is not None else scale
    assert stored is not None
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
        return torch.empty(
            (rows, *fmt.blocks((columns,))) if len(fmt.sizes) == 1 else tuple(fmt.blocks((rows, columns))),
            dtype=fmt.scale.storage if fmt.scale else torch.float32,
        )
    return torch.empty((rows, 1)) if scheme.per_channel else None


def _pieces(tensor: Stored, multiple: int, advance: Advance) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a matrix; `multiple` rows belong together."""
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{tensor.where} is {tensor.dtype}: a weight to quantize is float16, bfloat16 or float32")
    rows, columns = tensor.shape
    step = max(1, _CHUNK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        values = tensor.rows(start, min(start + step, rows))
        yield start, values
        advance(values.nbytes)


def _amax(values: torch.Tensor, tensor: Stored) -> torch.Tensor:
    low, high = torch.aminmax(values)  # which carries a NaN on
    largest = torch.maximum(-low, high).float()
    if not bool(torch.isfinite(largest)):
        raise CheckpointError(f"{tensor.where} holds NaN or infinity, which cannot be quantized: repair the checkpoint")
    return largest
