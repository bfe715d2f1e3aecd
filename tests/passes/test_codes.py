"""The one round-to-nearest: rows at a time give what the whole weight gives, with scales measured or chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.codes import rows_together, write_codes
from passes.formats import FP8, FP8_128X128, INT8, NVFP4, Format
from passes.ir import dynamic_quantize, quantize

WEIGHTS = arrays(
    np.float32,
    st.sampled_from([(1, 32), (130, 32), (3, 130, 32)]),
    elements=st.sampled_from([0.0, np.nan, np.inf, 1e-38, 3e38]) | st.floats(-9, 9, width=32),
    fill=st.floats(-2, 2, width=32),
)


def in_pieces(weight: torch.Tensor, fmt: Format, *scales: torch.Tensor | None, chosen: bool, step: int) -> torch.Tensor:
    together = rows_together(fmt, weight.ndim) if fmt.sizes else 1
    step *= together
    rows = [(slice(i, i + step), weight[i : i + step]) for i in range(0, weight.shape[0], step)]
    size = (*weight.shape[:-1], weight.shape[-1] // 2) if fmt.packed else weight.shape
    codes = torch.empty(size, dtype=fmt.storage)
    write_codes(rows, fmt, codes, *scales, chosen=chosen)
    return codes.view(torch.uint8)


@pytest.mark.parametrize("fmt", [NVFP4, FP8_128X128], ids=lambda f: f.name)
@settings(max_examples=25, deadline=None)
@given(weight=WEIGHTS, step=st.integers(1, 3))
def test_blocks(fmt: Format, weight: np.ndarray, step: int) -> None:
    x, above = torch.from_numpy(weight), torch.tensor(0.01) if fmt.scale else None
    codes, scales = dynamic_quantize(x, above, format=fmt.name)
    measured = torch.empty_like(scales)
    assert torch.equal(in_pieces(x, fmt, above, measured, chosen=False, step=step), codes.view(torch.uint8))
    assert torch.equal(measured.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(in_pieces(x, fmt, above, scales, chosen=True, step=step), codes.view(torch.uint8))


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
@settings(max_examples=25, deadline=None)
@given(weight=WEIGHTS, step=st.integers(1, 3))
def test_tensors_and_channels(fmt: Format, weight: np.ndarray, step: int) -> None:
    x = torch.from_numpy(weight).nan_to_num(0, 1, -1)
    for scale in (torch.tensor(0.03), x.abs().amax(-1, keepdim=True).clamp_min(1e-3) / fmt.max):
        whole = quantize(x, scale, format=fmt.name).view(torch.uint8)
        assert torch.equal(in_pieces(x, fmt, scale, chosen=False, step=step), whole)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_the_nearest_number_is_what_the_code_stands_for(numbers: list[float]) -> None:
    ties = torch.arange(-64, 64) / 8
    x = torch.cat([torch.tensor(numbers), ties, ties * 2.0**-8, ties * 64])
    x = torch.nn.functional.pad(x, (0, x.numel() % 2))
    for fmt in (FP8, INT8, NVFP4):
        assert torch.equal(fmt.nearest(x) + 0.0, fmt.decode(fmt.encode(x)) + 0.0), fmt.name
