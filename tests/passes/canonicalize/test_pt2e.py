"""Operators of pt2e with any scale, zero point and range, against what they compute themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines the operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.canonicalize.pt2e import Pt2eToQdq
from passes.canonicalize.zero_points import MoveZeroPoints
from passes.errors import PassError
from passes.graph import aten
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.testing import count, declines, graph_of, only_call, rewrites, run

OPS = torch.ops.quantized_decomposed
UINT8, INT8 = (0, 255, torch.uint8), (-128, 127, torch.int8)


class Pair(nn.Module):
    """quantize and dequantize of an activation."""

    def __init__(self, scale: float, zero_point: int, codes: tuple[int, int, torch.dtype]) -> None:
        super().__init__()
        self.options = (scale, zero_point, *codes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *self.options), *self.options)
        return result


class Linear(nn.Module):
    """A layer as convert_pt2e leaves it: weights as codes, or not `folded` yet."""

    def __init__(self, zero_point: int = 95, *, folded: bool = True, bias: bool = True, weight_zero: int = 0) -> None:
        super().__init__()
        self.pair = Pair(0.02, zero_point, UINT8)
        self.linear = nn.Linear(16, 8, bias=bias)
        weight = self.linear.weight.detach()
        self.register_buffer("scales", weight.abs().amax(1) / 127.5)
        self.register_buffer("zeros", torch.full((8,), weight_zero))
        self.folded = folded
        if folded:
            self.register_buffer("codes", OPS.quantize_per_channel(weight, self.scales, self.zeros, 0, *INT8))

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes if self.folded else None
        if codes is None:
            codes = OPS.quantize_per_channel(self.linear.weight, self.scales, self.zeros, 0, *INT8)
        weight = OPS.dequantize_per_channel(codes, self.scales, self.zeros, 0, *INT8)
        return nn.functional.linear(self.pair(x), weight, self.linear.bias)


@settings(max_examples=6)
@given(data=st.data())
def test_scales_zero_points_and_ranges(data: st.DataObject) -> None:
    codes = data.draw(st.sampled_from([UINT8, INT8]))
    low = data.draw(st.integers(codes[0], codes[1] - 1))
    high = data.draw(st.integers(low + 1, codes[1]))
    zero_point = data.draw(st.integers(low, high))
    scale = data.draw(st.floats(2.0**-30, 2.0**30))
    values = data.draw(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=20, max_size=20))
    x = torch.tensor(values)
    module = Pair(scale, zero_point, (low, high, codes[2]))
    gm = graph_of(module, x)
    Pt2eToQdq()(gm)
    got, want = run(gm, x)[0], module(x)
    inside = x.double() / scale
    near_tie = ((inside - inside.floor()) - 0.5).abs() < 1e-4  # there the neighbouring code is as good
    assert bool(((got - want).abs() <= scale * (near_tie * 1.001 + 1e-4)).all())
    assert not Pt2eToQdq()(gm).modified


@pytest.mark.everyday(2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("zero_point", [0, 95, 128])
def test_a_layer_keeps_its_codes_and_its_zero_point_moves(zero_point: int, folded: bool, bias: bool) -> None:
    module, x = Linear(zero_point, folded=folded, bias=bias), torch.rand(3, 16)
    gm = graph_of(module, x)
    rewrites(Pt2eToQdq, gm, x, fired=2, rtol=1e-5, atol=1e-5)
    stored = gm.state_dict()["linear.weight" if not folded else "weight"]
    assert torch.equal(stored, OPS.quantize_per_channel(module.linear.weight, module.scales, module.zeros, 0, *INT8))
    assert stored.dtype is torch.int8
    if zero_point != 128:
        rewrites(MoveZeroPoints, gm, x, rtol=1e-5, atol=1e-5)
    linear = only_call(gm, aten.linear.default)
    assert all(operand.target is DEQUANTIZE for operand in linear.args[:2])
    assert count(gm, aten.sub.Tensor) == 0


def test_tensor_scales_and_those_measured_symmetrically() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.1))
            self.register_buffer("zero", torch.tensor(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            fixed = (self.scale, self.zero, *INT8)
            measured = (*OPS.choose_qparams_symmetric.tensor(x, -127, 127, 1e-6, torch.int8), -127, 127, torch.int8)
            token = (*OPS.choose_qparams_per_token(x, torch.int8), *INT8)
            return (
                OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *fixed), *fixed),
                OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *measured), *measured),
                OPS.dequantize_per_token(OPS.quantize_per_token(x, *token), *token, torch.float32),
            )

    x = torch.randn(4, 16)
    gm = graph_of(Other(), x)
    want = Other()(x)
    Pt2eToQdq()(gm)
    assert (count(gm, QUANTIZE), count(gm, DYNAMIC_QUANTIZE)) == (1, 2)
    for got, wanted in zip(run(gm, x), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_weights_with_zero_points_are_right_and_reported() -> None:
    module, x = Linear(weight_zero=5), torch.rand(3, 16)
    gm = graph_of(module, x)
    instance = Pt2eToQdq()
    (want,) = run(gm, x)
    instance(gm)
    torch.testing.assert_close(run(gm, x)[0], want, rtol=1e-4, atol=1e-4)
    assert "symmetric weights" in instance.log.declined[0].reason


def test_a_weight_from_run_time_is_declined() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(0.02, 95, UINT8)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return nn.functional.linear(self.pair(x), weight)

    gm = graph_of(Product(), torch.rand(3, 16), torch.rand(8, 16))
    Pt2eToQdq()(gm)
    assert "computed at run time" in declines(MoveZeroPoints, gm)[0]


def test_a_weight_without_zero_points_and_a_scale_that_the_graph_writes() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-128, 128, (8, 16), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(8) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            fixed = (torch.full((), 0.05, dtype=torch.float64), torch.full((), 7), *INT8)
            x = OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *fixed), *fixed)
            return nn.functional.linear(x, OPS.dequantize_per_channel(self.codes, self.scales, None, 0, *INT8))

    x, module = torch.randn(3, 16), Constants()
    gm = graph_of(module, x)
    rewrites(Pt2eToQdq, gm, x, fired=2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(gm, x)[0], module(x), rtol=1e-4, atol=1e-4)
    (weight,) = (node for node in gm.graph.nodes if node.target is DEQUANTIZE and node.args[0].op == "get_attr")
    assert torch.equal(gm.get_parameter(weight.args[0].target), module.codes)


class Channels(nn.Module):
    """An activation with a scale for each channel."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scales", torch.ones((4, 16)[axis]))
        self.register_buffer("zeros", torch.zeros((4, 16)[axis], dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        options = (self.scales, self.zeros, self.axis, *INT8)
        result: Tensor = OPS.dequantize_per_channel(OPS.quantize_per_channel(x, *options), *options)
        return result


class RunTime(nn.Module):
    """A scale that is computed, or one that is chosen but for codes that are rearranged."""

    def __init__(self, *, chosen: bool) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        if self.chosen:
            options = (*OPS.choose_qparams_symmetric.tensor(x, -127, 127, 1e-6, torch.int8), -127, 127, torch.int8)
        else:
            options = (x.abs().max() / 127, torch.zeros((), dtype=torch.int64), *INT8)
        codes = OPS.quantize_per_tensor.tensor(x, *options)
        result: Tensor = OPS.dequantize_per_tensor.tensor(codes.t().contiguous() if self.chosen else codes, *options)
        return result


class Measured(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale, zero = OPS.choose_qparams.tensor(x, -128, 127, 1e-6, torch.int8)
        codes = OPS.quantize_per_tensor.tensor(x, scale, zero, *INT8)
        result: Tensor = OPS.dequantize_per_tensor.tensor(codes, scale, zero, *INT8)
        return result


class Groups(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale, zero = torch.ones(4, 2), torch.zeros(4, 2)
        result: Tensor = OPS.quantize_per_channel_group(x, scale, zero, *INT8, 8)
        return result


class Codes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = OPS.quantize_per_tensor(x, 0.1, 0, *INT8)
        return result + 1


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("module", "reason"),
    [(Measured(), "zero point at run time"), (Groups(), "not a form"), (Codes(), "reads codes"),
     (Pair(0.1, 0, (-32768, 32767, torch.int16)), "int8 and uint8"),
     (Pair(0.1, 0, (5, 5, torch.uint8)), "codes of torch.uint8 between 5 and 5"),
     (Channels(0), "activations with a scale for each channel"), (Channels(1), "channels along axis 1"),
     (RunTime(chosen=False), "scale or zero point is computed at run time"),
     (RunTime(chosen=True), "codes with a run-time scale come from aten")],
    ids=["measured", "groups", "codes", "int16", "range", "channels", "axis", "computed", "rearranged"],
)  # fmt: skip
def test_what_cannot_be_said_is_an_error(module: nn.Module, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        Pt2eToQdq()(graph_of(module, torch.randn(4, 16)))
