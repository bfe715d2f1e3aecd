"""The block scales of an activation in standard operators: the same codes and scales, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import FP8_PER_TOKEN, NVFP4
from passes.graph import aten, calls
from passes.graph import dtype as dtype_of
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize, dynamic_quantize
from passes.legalize.block_scales import SpellOutBlockScales
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import insert

G = torch.tensor(0.0005)


class Raw(nn.Module):
    """Codes and scales themselves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, block_scales = torch.ops.qcompile.dynamic_quantize(x, self.g, format="nvfp4")
        scale = torch.ops.qcompile.dequantize(block_scales, self.g, format="fp8", dtype=torch.float32)
        return codes, block_scales, torch.ops.qcompile.dequantize(codes, scale, format="nvfp4", dtype=x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("g", G.clone())


@pytest.fixture(scope="module")
def spelled_out() -> GraphModule:
    gm = graph_of(Raw(), torch.randn(3, 32), dynamic_shapes=({0: DYNAMIC},))
    assert SpellOutBlockScales()(gm).modified
    return gm


sizes = st.sampled_from([0.0, 1e-38, 1e-9, 1e-4, 1.0, 1e6, 1e38]).map(np.float32)


@given(
    hnp.arrays(np.float32, (2, 2, 16), elements=st.floats(-3, 3, width=32)),
    hnp.arrays(np.float32, (2, 2, 1), elements=sizes),
)
def test_every_bit_is_that_of_the_operator(spelled_out: GraphModule, x: np.ndarray, magnitude: np.ndarray) -> None:
    tensor = torch.from_numpy((x * magnitude).reshape(2, 32))
    codes, block_scales, values = run(spelled_out, tensor)
    expected_codes, expected_scales = dynamic_quantize(tensor, G, format="nvfp4")
    assert torch.equal(codes, expected_codes)
    assert torch.equal(block_scales.view(torch.uint8), expected_scales.view(torch.uint8))
    scale = dequantize(expected_scales, G, format="fp8", dtype=torch.float32)
    assert torch.equal(values, dequantize(expected_codes, scale, format="nvfp4", dtype=torch.float32))


def test_a_nan_stays_in_its_block(spelled_out: GraphModule) -> None:
    x = torch.randn(2, 32)
    x[0, 3] = torch.nan
    values = run(spelled_out, x)[2]
    assert values[0, :16].isnan().all() and values[0, 16:].isfinite().all() and values[1].isfinite().all()


@pytest.mark.everyday(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)], ids=str)
def test_a_layer_with_both_operands(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    gm = graph_of(nn.Linear(32, 4).to(dtype), torch.randn(*lead, 32, dtype=dtype), dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {"input": G, "weight": G}, NVFP4)
    FoldWeights()(gm)
    x = torch.randn(5, *lead[1:], 32, dtype=dtype)
    x[0] = 0
    rewrites(SpellOutBlockScales, gm, x)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, QUANTIZE), count(gm, aten.amax.default)) == (0, 2, 1)
    assert {dtype_of(node.args[0]) for node in calls(gm.graph, QUANTIZE)} == {torch.float32}  # type: ignore[arg-type]
    assert count(gm, DEQUANTIZE) == 4  # codes and scales of both operands, each once
    assert set(gm.state_dict()) >= {"one", "weight", "weight_block_scale", "weight_global_scale"}


def test_two_layers_with_one_input_measure_it_once() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x.sin()
            return self.a(x), self.b(x), x

    x = torch.randn(2, 32)
    gm = graph_of(Fork(), x)
    insert(gm, {"input": G}, NVFP4)
    rewrites(SpellOutBlockScales, gm, x)


def test_scales_of_one_level_are_not_its_business() -> None:
    gm = graph_of(nn.Linear(32, 4), torch.randn(2, 32))
    InsertQdq({site: Quantizer(FP8_PER_TOKEN, None) for site in find_sites(gm) if site.operand == "input"})(gm)
    assert declines(SpellOutBlockScales, gm) == []
    assert count(gm, DYNAMIC_QUANTIZE) == 1
