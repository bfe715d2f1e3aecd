"""The scales of a quantized linear layer: what shape they have, and how they multiply a product of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.constants import add_constant, constant
from passes.graph import Emitter, aten, dtype
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.lower.scales import float32_scale, is_one_scale, is_row_scale, runs_along_k, scale_product, unscalable
from passes.reading import QuantizedLayer
from passes.testing import blank, count, returns, run

SHAPES = [(), (1,), (1, 1), (5, 1), (2, 5, 1), (4,), (5, 4), (1, 4)]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_what_a_scale_is_for(sizes: tuple[int, ...]) -> None:
    _, _, (scale, flat, batched) = blank(torch.ones(sizes), torch.ones(5, 4), torch.ones(2, 5, 4))
    assert is_one_scale(scale) == (sizes in [(), (1,), (1, 1)])
    assert runs_along_k(scale) == (sizes in [(4,), (5, 4), (1, 4)])
    assert is_row_scale(scale, flat) == (sizes == (5, 1))
    assert is_row_scale(scale, batched) == (sizes == (2, 5, 1))


def linear(
    scale: Tensor, weight_scale: Tensor, lead: tuple[int, ...] = (5,), experts: int | None = None
) -> tuple[GraphModule, Emitter, QuantizedLayer]:
    codes, weight = torch.ones(*lead, 4), torch.ones(*([experts] if experts else []), 3, 4)
    gm, emit, (x,) = blank(codes.to(torch.float8_e4m3fn))
    options = {"format": "fp8", "dtype": torch.float32}
    s = add_constant(gm, "s", scale, emit.before)
    w = add_constant(gm, "w", weight.to(torch.float8_e4m3fn), emit.before)
    ws = add_constant(gm, "ws", weight_scale, emit.before)
    operands = emit(DEQUANTIZE, x, s, **options), emit(DEQUANTIZE, w, ws, **options)
    found = QuantizedLayer.of_codes(emit(BATCHED_LINEAR if experts else aten.linear.default, *operands))
    assert found is not None
    return gm, emit, found


ONE, ROWS, COLUMNS = torch.tensor(0.5), torch.rand(5, 1), torch.rand(3, 1)


@pytest.mark.parametrize(
    ("scale", "weight_scale", "reason"),
    [
        (ONE, ONE, None),
        (ROWS, COLUMNS, None),
        (ONE, torch.rand(1, 4), "the weight has scales along the reduction axis"),
        (torch.rand(1, 4), ONE, "the input has neither one scale nor one for each row"),
        (torch.rand(5, 4), COLUMNS, "the input has neither one scale nor one for each row"),
    ],
)
def test_what_cannot_be_applied_behind_a_product(scale: Tensor, weight_scale: Tensor, reason: str | None) -> None:
    assert unscalable(linear(scale, weight_scale)[2]) == reason


def test_a_scale_in_float32_stays_a_constant() -> None:
    gm, emit, (x,) = blank(ONE.half())
    wide, half = (add_constant(gm, "a", scale, emit.before) for scale in (ONE, ONE.half()))
    assert float32_scale(gm, emit, wide) is wide
    made = float32_scale(gm, emit, half)
    value = constant(gm, made)
    assert value is not None and value.dtype is torch.float32 and value == ONE
    assert count(gm, aten._to_copy.default) == 0
    cast = float32_scale(gm, emit, x)
    assert cast.target is aten._to_copy.default and dtype(cast) is torch.float32


@pytest.mark.parametrize("scale", [ONE, torch.full((1,), 0.5), ROWS], ids=lambda s: str(list(s.shape)))
@pytest.mark.parametrize("weight_scale", [ONE, COLUMNS, COLUMNS.half()], ids=lambda s: f"{list(s.shape)} {s.dtype}")
def test_a_product_of_codes_times_its_scales(scale: Tensor, weight_scale: Tensor) -> None:
    gm, emit, found = linear(scale, weight_scale)
    product = add_constant(gm, "product", torch.randn(5, 3), emit.before)
    (got,) = run(
        returns(gm, scale_product(gm, emit, found, product, found.x.scale)), torch.ones(5, 4).to(torch.float8_e4m3fn)
    )
    columns = weight_scale.float() if weight_scale.ndim == 0 else weight_scale.float().t()
    torch.testing.assert_close(got, gm.get_buffer("product") * scale * columns, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight_scale", [ONE, torch.rand(2, 3, 1)], ids=["one", "rows"])
def test_experts_side_by_side(weight_scale: Tensor) -> None:
    gm, emit, found = linear(ONE, weight_scale, (1, 5), experts=2)
    product = add_constant(gm, "product", torch.randn(5, 6), emit.before)
    (got,) = run(
        returns(gm, scale_product(gm, emit, found, product, found.x.scale)), torch.ones(1, 5, 4).to(torch.float8_e4m3fn)
    )
    torch.testing.assert_close(got, gm.get_buffer("product") * ONE * weight_scale.expand(2, 3, 1).reshape(1, 6))
