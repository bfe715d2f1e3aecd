"""Quantize/dequantize pairs: what is added, and what is recognised as one."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from passes.constants import constant
from passes.errors import PassError
from passes.formats import FP8, FP8_PER_TOKEN, INT8, NVFP4, Format
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize, dynamic_quantize, quantize
from passes.pairs import checked, constant_pair, measured_by, measured_pair, name_quantizer
from passes.testing import blank, returns, run

X = torch.randn(3, 32)


def test_a_scale_is_float32_and_apart_from_training() -> None:
    scale = checked(nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float16)), "x")
    assert scale.dtype is torch.float32 and not scale.requires_grad and scale.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        ([1.0, 0.0], "0 to 1"),
        ([1.0, -2.0], "-2 to 1"),
        ([1.0, torch.inf], "1 to inf"),
        ([torch.nan, 1.0], "nan to nan"),
    ],
)
def test_a_scale_that_is_none_is_an_error(scale: list[float], found: str) -> None:
    with pytest.raises(PassError, match=f"^layer.input_scale holds {found}: scales are positive"):
        checked(torch.tensor(scale), "layer.input_scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
def test_a_constant_pair(fmt: Format, dtype: torch.dtype) -> None:
    gm, emit, (x,) = blank(X.to(dtype))
    scale = torch.tensor(0.02)
    pair = constant_pair(gm, x, scale, fmt, "layer.input_scale", emit)
    assert pair.target is DEQUANTIZE and pair.args[0].target is QUANTIZE  # type: ignore[union-attr]
    assert pair.args[1] is pair.args[0].args[1]  # type: ignore[union-attr]
    assert set(gm.state_dict()) == {"layer.input_scale"} and measured_by(pair) is None
    (got,) = run(returns(gm, pair), X.to(dtype))
    codes = quantize(X.to(dtype), scale, format=fmt.name)
    torch.testing.assert_close(got, dequantize(codes, scale, format=fmt.name, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pair_of_two_levels_under_a_global_scale(dtype: torch.dtype) -> None:
    gm, emit, (x,) = blank(X.to(dtype))
    scale = torch.tensor(0.001)
    pair = constant_pair(gm, x, scale, NVFP4, "layer.input_scale", emit)
    assert set(gm.state_dict()) == {"layer.input_global_scale"}
    dynamic = measured_by(pair)
    assert dynamic is not None and dynamic.target is DYNAMIC_QUANTIZE and constant(gm, dynamic.args[1]) == scale
    (got,) = run(returns(gm, pair), X.to(dtype))
    codes, blocks = dynamic_quantize(X.to(dtype), scale, format="nvfp4")
    own = dequantize(blocks, scale, format="fp8", dtype=torch.float32)
    torch.testing.assert_close(got, dequantize(codes, own, format="nvfp4", dtype=dtype), rtol=0, atol=0)


def test_what_is_measured_is_recognised_and_nothing_else() -> None:
    _gm, emit, (x,) = blank(X)
    pair = measured_pair(x, FP8_PER_TOKEN, emit)
    dynamic = measured_by(pair)
    assert dynamic is not None and dynamic.args == (x, None)
    codes, scale = (emit.getitem(dynamic, index) for index in (0, 1))
    options = {"format": FP8_PER_TOKEN.name, "dtype": torch.float32}
    swapped = emit(DEQUANTIZE, scale, scale, **options)
    largest = emit(aten.max.dim, x, 1)
    other = emit(DEQUANTIZE, emit(operator.getitem, largest, 0), scale, **options)
    for node in (codes, dynamic, swapped, other, x, None, 3.0):
        assert measured_by(node) is None


def test_both_halves_say_which_quantizer_they_are() -> None:
    gm, emit, (x,) = blank(X)
    fixed, measured = constant_pair(gm, x, torch.tensor(1.0), FP8, "s", emit), measured_pair(x, FP8_PER_TOKEN, emit)
    fixed.meta["custom"] = {"note": 1}
    halves = (fixed, fixed.args[0]), (measured, measured_by(measured))
    for pair, first in halves:
        name_quantizer(pair, "layer.input_quantizer")
        assert pair.meta["custom"]["quantizer"] == first.meta["custom"]["quantizer"] == "layer.input_quantizer"  # type: ignore[union-attr]
    assert fixed.meta["custom"]["note"] == 1
