"""A quantized layer read off a graph, in every format and before and after its weight is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.constants import evaluate_constant
from passes.formats import FP8, FP8_PER_TOKEN, INT8, NVFP4, Format
from passes.graph import aten, calls, only_user
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.reading import Operand, QuantizedLayer, source_of
from passes.testing import graph_of, only_call
from tests.passes.blocks import INPUT, WEIGHT
from tests.passes.lower.cuda.support import quantized

SCALE = torch.tensor(0.01)
X = torch.randn(3, 128)


@pytest.mark.parametrize(
    ("weight", "x"),
    [
        (Quantizer(FP8, SCALE), Quantizer(FP8, SCALE)),
        (Quantizer(FP8, torch.full((8, 1), 0.01)), Quantizer(FP8_PER_TOKEN, None)),
        (Quantizer(INT8, SCALE), None),
        (Quantizer(NVFP4, SCALE), Quantizer(NVFP4, SCALE)),
        (WEIGHT, INPUT),
    ],
    ids=lambda q: q.format.name if q else "none",
)
def test_codes_scales_and_formats(weight: Quantizer, x: Quantizer | None) -> None:
    gm = quantized(nn.Linear(128, 8), X, weight=weight, input=x)
    layer = QuantizedLayer.read(only_call(gm, aten.linear.default))
    assert layer is not None and (layer.name, layer.sizes, layer.dtype) == ("", (8, 128), torch.float32)
    assert layer.weight.format == weight.format and layer.weight.is_constant and layer.weight.quantizer is None
    assert (layer.weight.global_scale is not None) == (weight.format is NVFP4)
    assert {part.op for part in layer.weight.parts} == {"get_attr"}
    scale = layer.weight.scale
    if layer.weight.block_scales is not None and layer.weight.global_scale is not None:
        parts = [evaluate_constant(gm, node) for node in (layer.weight.block_scales, layer.weight.global_scale)]
        read = dequantize(*parts, format="fp8", dtype=torch.float32)
    else:
        read = evaluate_constant(gm, scale)
    codes = evaluate_constant(gm, layer.weight.codes)
    assert dequantize(codes, read, format=weight.format.name, dtype=torch.float32).shape == (8, 128)
    assert (layer.bias is not None) and (layer.input is None) == (x is None)
    assert (QuantizedLayer.of_codes(layer.node) is None) == (x is None)
    if x is not None:
        (source,) = gm.graph.find_nodes(op="placeholder")
        assert layer.x.format == x.format and not layer.x.is_constant
        assert layer.x.source is source_of(layer.x.node) is source
        assert (layer.x.measured is not None) == (x.scale is None or x.format.scale is not None)
        assert layer.x.quantizer in calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE)


@pytest.mark.parametrize("fmt", [FP8, NVFP4], ids=lambda fmt: fmt.name)
def test_a_weight_that_is_not_stored_yet(fmt: Format) -> None:
    gm = graph_of(nn.Linear(128, 8), X)
    (site,) = [site for site in find_sites(gm) if site.operand == "weight"]
    InsertQdq({site: Quantizer(fmt, SCALE)})(gm)
    layer = QuantizedLayer.read(only_call(gm, aten.linear.default))
    assert layer is not None and not layer.weight.is_constant and layer.weight.source is not None
    assert layer.weight.source.op == "get_attr" and QuantizedLayer.of_codes(layer.node) is None


def test_what_is_not_quantized_is_not_read() -> None:
    gm = quantized(nn.Linear(128, 8), X, weight=None, input=Quantizer(FP8, SCALE))
    linear = only_call(gm, aten.linear.default)
    assert QuantizedLayer.read(linear) is None  # only its input is
    pair = Operand.read(linear.args[0])
    assert pair is not None and pair.node is only_call(gm, DEQUANTIZE) and only_user(pair.node) is linear
    assert Operand.read(linear) is Operand.read(None) is source_of(linear.args[1]) is None
