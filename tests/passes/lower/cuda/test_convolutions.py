"""Quantized convolutions on a CUDA device: the numbers of the program, from weights in its own precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8, Format
from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.lower.cuda.convolutions import ConvolutionsInHalfPrecision
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.normalize.convolution import NormalizeConvolution
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, graph_of, rewrites, run
from tests.passes.lower.cuda.support import ADA, AMPERE

S = torch.tensor(0.02)


def quantized(fmt: Format, *operands: str) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    x = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    gm = graph_of(nn.Conv2d(4, 6, 3, padding=1).bfloat16(), x, dynamic_shapes=({0: DYNAMIC},))
    NormalizeConvolution()(gm)
    InsertQdq({site: Quantizer(fmt, S) for site in find_sites(gm) if site.operand in operands})(gm)
    FoldWeights()(gm)
    return gm, x


@pytest.mark.parametrize(("fmt", "device"), [(INT8, AMPERE), (FP8, ADA)])
@pytest.mark.parametrize("operands", [("weight", "input"), ("weight",)])
def test_the_numbers_stay(fmt: Format, device: Device, operands: tuple[str, ...]) -> None:
    gm, x = quantized(fmt, *operands)
    log = rewrites(lambda: ConvolutionsInHalfPrecision(device), gm, x)
    assert [decline.reason for decline in log.declined] == [
        "torch convolves no codes on a CUDA device: it runs in bfloat16"
    ]
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (len(operands) - 1,) * 2
    assert [(k.layer, k.kernel, k.dropped) for k in kernels(gm)] == [("", "convolution in bfloat16", "")]
    assert gm.state_dict().keys() == {"weight_dequantized", "bias"} | {"input_scale"} & {f"{o}_scale" for o in operands}


def test_a_device_that_does_not_convert_the_format_reads_the_input_as_it_is() -> None:
    gm, x = quantized(FP8, "weight", "input")
    state = gm.state_dict()
    weight = (state["weight"].float() * state["weight_scale"].float()).bfloat16()
    ConvolutionsInHalfPrecision(AMPERE)(gm)
    assert count(gm, QUANTIZE, DEQUANTIZE) == 0 and count(gm, aten.convolution.default) == 1
    assert kernels(gm)[0].dropped == "the input is not quantized: the device has no fp8"
    assert torch.equal(run(gm, x)[0], torch.conv2d(x, weight, state["bias"], padding=1))
