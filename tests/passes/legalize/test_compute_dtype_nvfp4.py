"""NVFP4 in half precision: block scales and global scales stay in float32, weights are coded from the source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import NVFP4
from passes.graph import aten, dtype
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.scales import RoundScales
from passes.testing import DYNAMIC, declines, graph_of, run
from tests.nvfp4 import oracle, rounded, unpacked
from tests.passes.support import insert

G = torch.tensor(3e-9)  # float16 has nothing so small


def converted(
    module: nn.Module, x: torch.Tensor, target: torch.dtype, source: torch.dtype = torch.float32
) -> GraphModule:
    gm = graph_of(module, x, dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {"input": G, "weight": G}, NVFP4)
    make = lambda: ConvertComputeDtype(source, target)  # noqa: E731
    assert make()(gm).modified
    assert declines(make, gm) == []
    return gm


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_scales_stay_in_float32_and_the_product_does_not(target: torch.dtype) -> None:
    layer, x = nn.Linear(32, 4, bias=False), torch.randn(5, 32) * 1e-5
    gm = converted(layer, torch.randn(3, 32), target)
    kinds = {(n.kwargs["format"], dtype(n)) for n in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)}
    assert kinds == {("fp8", torch.float32), ("nvfp4", target)}
    assert [dtype(n) for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default)] == [target]
    assert declines(RoundScales, gm) == []
    assert {buffer.dtype for buffer in gm.buffers()} == {torch.float32}
    operands = [rounded(x.to(target).float().numpy(), G), rounded(layer.weight.detach().numpy(), G)]
    expected = nn.functional.linear(*(torch.from_numpy(value).to(target) for value in operands)).float()
    torch.testing.assert_close(run(gm, x)[0], expected, rtol=0, atol=0)


def test_codes_come_from_the_numbers_of_the_source() -> None:
    layer = nn.Linear(64, 64, bias=False)
    gm = converted(layer, torch.randn(3, 64), torch.float16)
    assert FoldWeights()(gm).modified
    codes, _ = oracle(layer.weight.detach().numpy(), G)
    np.testing.assert_array_equal(unpacked(gm.get_parameter("weight").detach()), codes)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_goes_to_another(source: torch.dtype) -> None:
    target = torch.bfloat16 if source is torch.float16 else torch.float16
    layer = nn.Linear(32, 4, bias=False).to(source)
    gm = converted(layer, torch.randn(3, 32, dtype=source), target, source)
    quantizes = gm.graph.find_nodes(op="call_function", target=DYNAMIC_QUANTIZE)
    assert {dtype(n.args[0]) for n in quantizes} == {source, target}  # the weight, the input
    (y,) = run(gm, torch.randn(3, 32, dtype=source) * 1e-5)
    assert y.dtype is source and bool(y.isfinite().all())
