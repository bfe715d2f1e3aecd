"""Operators of nvidia-modelopt, against what they compute themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.canonicalize.modelopt import ModeloptToQdq
from passes.constants import constant
from passes.errors import PassError
from passes.fold.weights import FoldWeights
from passes.formats import NVFP4
from passes.graph import aten, calls, module_path
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize, dynamic_quantize
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import count, graph_of, only_call, run

tensor_quant: Any = pytest.importorskip("modelopt.torch.quantization.tensor_quant")


class Quantized(nn.Module):
    """A linear layer whose input and weight go through `op(x, amax, *options)`, and that has modelopt's buffers."""

    def __init__(
        self, input_amax: Tensor, weight_amax: Tensor, options: tuple[Any, ...] = (8, 4, False, False)
    ) -> None:
        super().__init__()
        self.linear, self.options = nn.Linear(32, 24), options
        self.register_buffer("input_amax", input_amax)
        self.register_buffer("weight_amax", weight_amax)

    def forward(self, x: Tensor) -> Tensor:
        op = torch.ops.tensorrt.quantize_op
        weight = op(self.linear.weight, self.weight_amax.detach(), *self.options)
        return nn.functional.linear(op(x, self.input_amax.detach(), *self.options), weight, self.linear.bias)


def per_row(weight: Tensor) -> Tensor:
    return weight.detach().abs().amax(1, keepdim=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_fp8_computes_what_the_operator_does(per_channel: bool) -> None:
    module = Quantized(torch.tensor(3.0), torch.tensor(0.2))
    if per_channel:
        module.weight_amax = per_row(module.linear.weight)
    x = torch.randn(4, 32)
    gm = graph_of(module, x)
    ModeloptToQdq()(gm)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (2, 2)
    torch.testing.assert_close(run(gm, x)[0], module(x).detach(), rtol=1e-5, atol=1e-6)
    assert not ModeloptToQdq()(gm).modified
    FoldWeights()(gm)
    assert gm.state_dict()["linear.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("narrow", [False, True])
def test_the_pair_of_an_int8_weight_reads_the_weight_itself(narrow: bool) -> None:
    gm = graph_of(Quantized(torch.tensor(3.0), torch.tensor(0.2), (8, 0, False, narrow)), torch.randn(4, 32))
    ModeloptToQdq()(gm)
    x, weight = (pair.args[0].args[0] for pair in only_call(gm, aten.linear.default).args[:2])  # type: ignore[union-attr]
    assert weight.op == "get_attr" and (x.op == "placeholder") != narrow  # activations are clamped to the range before


@settings(max_examples=5)
@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=30, max_size=30),
    amax=st.floats(2.0**-20, 2.0**40, width=32),
    form=st.sampled_from([(4, False, False), (0, False, False), (0, False, True), (0, True, False)]),
)
def test_every_number(values: list[float], amax: float, form: tuple[int, bool, bool]) -> None:
    exponent, unsigned, narrow = form
    x = torch.tensor(values).abs() if unsigned else torch.tensor(values)
    if exponent:
        want = tensor_quant.fp8_eager(x, torch.tensor(amax))
    else:
        want = tensor_quant._tensor_quant(x, torch.tensor(amax), 8, unsigned, narrow)
    got = _quantized(x, (8, exponent, unsigned, narrow), amax)
    # one code apart at ties, and where a zero point is added
    step = torch.full_like(want, amax / 127) if not exponent else (want.abs() / 14).clamp_min(amax / 448 / 256)
    assert bool(((got - want).abs() <= step * 1.01).all())


class Activation(nn.Module):
    """One of modelopt's quantizers."""

    def __init__(self, amax: float, options: tuple[Any, ...] = (8, 4, False, False)) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("amax", torch.tensor(amax))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.tensorrt.quantize_op(x, self.amax, *self.options)
        return result


def _quantized(x: Tensor, options: tuple[Any, ...], amax: float) -> Tensor:
    """What the pass makes of a quantizer, on `x`."""

    gm = graph_of(Activation(amax, options), x)
    ModeloptToQdq()(gm)
    return run(gm, x)[0]


@pytest.mark.parametrize("options", [(8, 0, False, False), (8, 0, False, True), (8, 0, True, False)])
def test_int8_computes_what_the_operator_does(options: tuple[Any, ...]) -> None:
    x = torch.randn(400).abs() if options[2] else torch.randn(400)
    got = _quantized(x, options, 2.0)
    want = tensor_quant._tensor_quant(x, torch.tensor(2.0), 8, *options[2:])
    assert float(((got - want).abs() > 1e-5).float().mean()) < 0.01
    assert (got - want).abs().max() < 2.01 / 127


def test_an_amax_of_zero_stands_for_one() -> None:
    x = torch.randn(50)
    got = _quantized(x, (8, 4, False, False), 0.0)
    torch.testing.assert_close(got, tensor_quant.fp8_eager(x, torch.tensor(0.0)), rtol=1e-6, atol=0)


def test_nvfp4_is_the_chain_that_quantize_makes() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 24)
            self.register_buffer("amax", torch.tensor([2.5]))

        def forward(self, x: Tensor) -> Tensor:
            op = torch.ops.tensorrt.dynamic_block_quantize_op
            weight = op(self.linear.weight, 16, self.amax.detach(), 4, 2, 8, 4)
            return nn.functional.linear(op(x, 16, self.amax.detach(), 4, 2, 8, 4), weight, self.linear.bias)

    x = torch.randn(4, 32)
    module = Layer()
    gm = graph_of(module, x)
    ModeloptToQdq()(gm)
    own = graph_of(module.linear, x)
    scale = torch.tensor(2.5 / (6 * 448))
    InsertQdq({s: Quantizer(NVFP4, scale) for s in find_sites(own) if s.operand in ("input", "weight")})(own)
    assert torch.equal(run(gm, x)[0], run(own, x)[0])
    assert count(gm, DYNAMIC_QUANTIZE) == count(own, DYNAMIC_QUANTIZE) == 2


@pytest.mark.parametrize(("axes", "format"), [([0, 1], "fp8"), ([1], "fp8_per_token")])
def test_what_is_measured_stays_measured(axes: list[int], format: str) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            amax = torch.maximum(x.amax(axes, True).abs(), x.amin(axes, True).abs()).detach()
            result: Tensor = torch.ops.tensorrt.quantize_op(x, amax, 8, 4, False, False)
            return result

    x = torch.randn(4, 32)
    gm = graph_of(Dynamic(), x)
    want = Dynamic()(x)
    ModeloptToQdq()(gm)
    assert only_call(gm, DYNAMIC_QUANTIZE).kwargs["format"] == format
    assert not count(gm, aten.amax.default)
    torch.testing.assert_close(run(gm, x)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [[1], [0, 1]], ids=["channel", "tensor"])
def test_the_amax_of_a_weight_that_the_graph_computes_is_a_constant(axes: list[int]) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 24)

        def forward(self, x: Tensor) -> Tensor:
            amax = self.linear.weight.abs().amax(axes, keepdim=True).detach()
            weight = torch.ops.tensorrt.quantize_op(self.linear.weight, amax, 8, 4, False, False)
            return nn.functional.linear(x, weight, self.linear.bias)

    x, module = torch.randn(4, 32), Computed()
    gm = graph_of(module, x)
    ModeloptToQdq()(gm)
    torch.testing.assert_close(run(gm, x)[0], module(x).detach(), rtol=1e-5, atol=1e-6)
    scale = constant(gm, only_call(gm, QUANTIZE).args[1])
    assert scale is not None and scale.shape == ((24, 1) if axes == [1] else ())
    assert not count(gm, aten.amax.default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_global_scale_of_nvfp4_can_be_measured(dtype: torch.dtype) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.tensorrt.dynamic_block_quantize_op(x, 16, x.abs().amax((0, 1), True), 4, 2, 8, 4)
            return result

    x = torch.randn(4, 32).to(dtype)
    gm = graph_of(Dynamic(), x)
    ModeloptToQdq()(gm)
    scale = x.abs().amax().float() / (6 * 448)
    codes, blocks = dynamic_quantize(x, scale, format="nvfp4")
    want = dequantize(codes, dequantize(blocks, scale, format="fp8", dtype=torch.float32), format="nvfp4", dtype=dtype)
    (got,) = run(gm, x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert float((got - x).norm() / x.norm()) < 0.12


class Holder(nn.Module):
    """A module with a quantizer of this name, as modelopt puts one into a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, Activation(2.0))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.name)(x)
        return result


@pytest.mark.parametrize(
    ("module", "path", "name", "scale"),
    [
        (nn.Sequential(Holder("input_quantizer")), "0", "0.input_quantizer", "0.input_scale"),
        (nn.Sequential(Holder("k_bmm_quantizer")), "0", "0.k_bmm_quantizer", "0.k_scale"),
        (Holder("quantizer"), "", "quantizer", "tensor_scale"),
        (nn.Sequential(Holder("inner")), "0.inner", "0.inner", "0.inner_scale"),  # no quantizer by its name
    ],
)
def test_a_pair_belongs_to_the_module_around_its_quantizer(module: nn.Module, path: str, name: str, scale: str) -> None:
    gm = graph_of(module, torch.randn(4, 32))
    ModeloptToQdq()(gm)
    for node in (only_call(gm, QUANTIZE), only_call(gm, DEQUANTIZE)):
        assert (module_path(node), node.meta["custom"]["quantizer"], node.args[1].target) == (path, name, scale)  # type: ignore[union-attr]


@pytest.mark.parametrize(("rows", "rearranged"), [(256, aten.view), (200, aten.view), (256, aten.reshape)])
def test_weights_in_blocks(rows: int, rearranged: Any) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, rows)
            self.register_buffer("amax", torch.tensor([0.05, 0.1]).reshape(2, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight = nn.functional.pad(self.linear.weight, (0, 0, 0, 256 - rows)) if rows < 256 else self.linear.weight
            blocks = torch.ops.tensorrt.quantize_op(
                weight.reshape(2, 128, 1, 128), self.amax.detach(), 8, 4, False, False
            )
            weight = blocks.reshape(256, 128)
            return nn.functional.linear(x, weight[:rows] if rows < 256 else weight, self.linear.bias)

    x, module = torch.randn(3, 128), Blocks()
    gm = graph_of(module, x)
    for node in calls(gm.graph, aten.view.default):
        node.target = rearranged.default
    ModeloptToQdq()(gm)
    weight = only_call(gm, aten.linear.default).args[1]
    assert weight.kwargs["format"] == "fp8_128x128"  # type: ignore[union-attr]
    assert gm.state_dict()["linear.weight"].dtype == torch.float8_e4m3fn
    torch.testing.assert_close(run(gm, x)[0], module(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_quantizer_of_a_softmax_goes() -> None:
    class Probabilities(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.tensorrt.quantize_op(x.softmax(-1), torch.tensor(0.9), 8, 4, False, False)
            return result

    x = torch.randn(4, 32)
    gm = graph_of(Probabilities(), x)
    ModeloptToQdq()(gm)
    assert torch.equal(run(gm, x)[0], x.softmax(-1))


class Measured(nn.Module):
    """An activation whose amax is measured over these axes, or comes from outside."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor, amax: Tensor) -> Tensor:
        amax = x.abs().amax(self.axes, True) if self.axes else amax
        result: Tensor = torch.ops.tensorrt.quantize_op(x, amax, 8, 4, False, False)
        return result


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Measured(0), r"shape \(1, 32\), which is neither"), (Measured(), "amax comes from outside of this graph")],
    ids=["channels", "outside"],
)
def test_what_is_measured_otherwise_is_an_error(module: nn.Module, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        ModeloptToQdq()(graph_of(module, torch.randn(4, 32), torch.tensor(1.0)))


class Blocked(nn.Module):
    """A weight of 128 x 128 in four blocks, or an activation in blocks along its rows."""

    def __init__(self, *block: int) -> None:
        super().__init__()
        self.block = block
        self.weight = nn.Parameter(torch.randn(128, 128))
        self.register_buffer("amax", torch.ones(2, 1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.block:
            result: Tensor = torch.ops.tensorrt.dynamic_block_quantize_op(x, self.block[0], self.amax, *self.block[1:])
            return result
        blocks = torch.ops.tensorrt.quantize_op(self.weight.reshape(2, 64, 2, 64), self.amax, 8, 4, False, False)
        return x[:, :1] * blocks.reshape(128, 128)[:1, :32]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Blocked(), r"128 x 128; these are torch.Size\(\[2, 64, 2, 64\]\)"),
        (Blocked(32, 4, 2, 8, 4), "4 bits, 2 of them exponent in blocks of 32 with scales of 8 bits, 4 of them"),
        (Blocked(16, 4, 2, 8, 0), "4 bits, 2 of them exponent in blocks of 16 with scales of 8 bits, 0 of them"),
    ],
)
def test_other_blocks_are_errors(module: nn.Module, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        ModeloptToQdq()(graph_of(module, torch.randn(4, 32)))


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Quantized(torch.ones(4, 1), torch.tensor(1.0), (4, 0, False, False)), "INT4 is for weights"),
        (Quantized(torch.tensor(1.0), torch.tensor(1.0), (8, 5, False, False)), "8 bits, 5 of them"),
        (Quantized(torch.ones(1, 32), torch.tensor(1.0)), r"^quantize_op_1: an amax of shape \(1, 32\).* neither per"),
        (Quantized(torch.ones(4, 1), torch.tensor(1.0)), r"^quantize_op_1: an amax of shape \(4, 1\).* neither per"),
        (Quantized(torch.tensor(torch.nan), torch.tensor(1.0)), "scales are positive"),
    ],
    ids=["int4", "e5m2", "channels", "tokens", "nan"],
)
def test_other_formats_are_errors(module: nn.Module, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        ModeloptToQdq()(graph_of(module, torch.randn(4, 32)))
