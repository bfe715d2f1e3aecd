"""Linear layers that no kernel takes: the same numbers in half precision, and codes kept where they can be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.capabilities import UNITS
from passes.formats import FORMATS, FP8, INT8, NVFP4, Format
from passes.graph import aten, only_user
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.cuda.half_linears import LinearsInHalfPrecision, can_convert, has_kernel
from passes.lower.cuda.pipeline import cuda_pipeline
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, only_call, rewrites, run
from tests.passes.blocks import INPUT, WEIGHT
from tests.passes.lower.cuda.support import ADA, AMPERE, BLACKWELL, HOPPER, quantized
from tests.passes.support import Mlp

TURING = Device("cuda", (7, 5))
PAIRS = {
    "fp8": (Quantizer(FP8, torch.tensor(0.01)), Quantizer(FP8, torch.tensor(0.02))),
    "measured": (Quantizer(FP8, torch.tensor(0.01)), Quantizer(FP8, None)),
    "int8": (Quantizer(INT8, torch.tensor(0.01)), Quantizer(INT8, torch.tensor(0.02))),
    "nvfp4": (Quantizer(NVFP4, torch.tensor(0.001)), Quantizer(NVFP4, torch.tensor(0.002))),
    "blocks": (WEIGHT, INPUT),
}


def lower(device: Device) -> Any:
    return lambda: LinearsInHalfPrecision(device)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "device"), [("fp8", ADA), ("measured", HOPPER), ("int8", AMPERE)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_shape_that_does_not_fit_keeps_the_numbers(name: str, device: Device, to: torch.dtype, dynamic: bool) -> None:
    weight, input = PAIRS[name]
    x = torch.randn(3, 20).to(to)
    shapes = ({0: DYNAMIC},) if dynamic else None
    gm = quantized(Mlp(20, 12).to(to), x, weight=weight, input=input, dynamic_shapes=shapes)
    rewrites(lower(device), gm, x, fired=2)
    assert (count(gm, DEQUANTIZE), count(gm, QUANTIZE, DYNAMIC_QUANTIZE)) == (2, 2)
    precision = str(to).removeprefix("torch.")
    assert [(k.layer, k.kernel, k.dropped) for k in kernels(gm)] == [
        ("up", f"mm in {precision}", ""),
        ("down", f"mm in {precision}", ""),
    ]
    assert set(gm.state_dict()) >= {"up.weight_dequantized", "down.weight_dequantized"}
    assert not set(gm.state_dict()) & {"up.weight", "up.weight_scale", "down.weight", "down.weight_scale"}


@pytest.mark.parametrize(
    ("name", "device", "missing"),
    [
        ("fp8", AMPERE, "fp8"),
        ("measured", AMPERE, "fp8"),
        ("int8", TURING, "int8"),
        ("nvfp4", HOPPER, "nvfp4"),
        ("blocks", ADA, "fp8_1x128"),
        ("blocks", BLACKWELL, "fp8_1x128"),
    ],
)
def test_a_device_without_the_format_computes_on_the_input_itself(name: str, device: Device, missing: str) -> None:
    weight, input = PAIRS[name]
    x, module = torch.randn(3, 128), nn.Linear(128, 32)
    gm = quantized(module, x, weight=weight, input=input)
    plain = quantized(module, x, weight=weight, input=None)
    LinearsInHalfPrecision(device)(gm)
    assert count(gm, DEQUANTIZE, QUANTIZE, DYNAMIC_QUANTIZE) == 0
    torch.testing.assert_close(run(gm, x), run(plain, x), rtol=0, atol=0)
    (kernel,) = kernels(gm)
    assert kernel.dropped == f"the input is not quantized: the device has no {missing}"
    code = gm.code
    assert not LinearsInHalfPrecision(device)(gm).modified
    gm.recompile()
    assert gm.code == code


FOREIGN = Format("e5m2", "float8_e5m2", 57344.0, -57344.0)


@pytest.mark.parametrize("device", [ADA, HOPPER, BLACKWELL], ids=str)
@pytest.mark.parametrize("only_weight", [False, True])
def test_a_format_that_is_not_known_is_not_taken_for_fp8(
    device: Device, only_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, FOREIGN.name, FOREIGN)
    assert not has_kernel(device, FOREIGN) and not can_convert(device, FOREIGN)
    quantizer = Quantizer(FOREIGN, torch.tensor(0.001))
    x, module = torch.randn(3, 32), nn.Linear(32, 16)
    gm = quantized(module, x, weight=quantizer, input=None if only_weight else quantizer)
    plain = quantized(module, x, weight=quantizer, input=None)
    for make in cuda_pipeline(device):
        make()(gm)
    assert count(gm, DEQUANTIZE, QUANTIZE) == 0
    torch.testing.assert_close(run(gm, x), run(plain, x), rtol=0, atol=0)
    (kernel,) = kernels(gm)
    assert kernel.kernel == "mm in float32"
    assert kernel.dropped == ("" if only_weight else "the input is not quantized: the device has no e5m2")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_format_with_an_operator_has_a_device_that_multiplies_it(fmt: Format) -> None:
    assert (UNITS[fmt.family].cuda is not None) == any(
        has_kernel(device, fmt) and can_convert(device, fmt) for device in (ADA, HOPPER, BLACKWELL)
    )


def test_another_user_keeps_the_quantized_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    x = torch.randn(3, 32)
    gm = quantized(Two(), x, weight=PAIRS["fp8"][0], input=PAIRS["fp8"][1])
    pair = only_call(gm, aten.linear.default).args[0]
    gm.graph.output_node().args = ((gm.graph.output_node().args[0][0], pair),)  # type: ignore[index]
    (_, want) = run(gm, x)
    LinearsInHalfPrecision(AMPERE)(gm)
    (_, got) = run(gm, x)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1) and torch.equal(got, want)
    assert only_user(pair) is gm.graph.output_node()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fmt", "scale", "device", "kept"),
    [(FP8, 0.01, ADA, True), (FP8, 0.01, AMPERE, False), (INT8, 0.01, TURING, True), (NVFP4, 0.001, HOPPER, True)],
)
def test_a_program_of_quantized_weights_keeps_the_codes(fmt: Format, scale: float, device: Device, kept: bool) -> None:
    x = torch.randn(3, 32)
    gm = quantized(nn.Linear(32, 16), x, weight=Quantizer(fmt, torch.tensor(scale)), input=None)
    (want,) = run(gm, x)
    assert LinearsInHalfPrecision(device)(gm).modified is not kept
    assert torch.equal(run(gm, x)[0], want)
    (kernel,) = kernels(gm)
    assert kernel.kernel == ("mm in float32 of the weight dequantized in each call" if kept else "mm in float32")
    assert (count(gm, DEQUANTIZE) > 0) == kept


def test_a_float_model_stays() -> None:
    gm = quantized(nn.Linear(32, 16), torch.randn(3, 32), weight=None, input=None)
    assert not LinearsInHalfPrecision(ADA)(gm).modified and kernels(gm) == []


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_weight_that_is_read_twice_is_stored_once() -> None:
    weight, input = PAIRS["fp8"]
    x = torch.randn(3, 20)
    gm = quantized(Tied(), x, weight=weight, input=input)
    rewrites(lower(ADA), gm, x, fired=2)
    assert [name for name in gm.state_dict() if name.endswith("dequantized")] == ["layer.weight_dequantized"]
