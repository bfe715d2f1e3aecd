"""FP4 codes in plain arithmetic: the bytes of ml_dtypes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.formats import NVFP4
from passes.ir import DYNAMIC_QUANTIZE
from passes.lower.fp4_codes import SpellOutFp4Codes
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.nvfp4 import bits, oracle, unpacked


class Quantize(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.tensor(scale))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scales = torch.ops.qcompile.dynamic_quantize(x, self.scale, format=NVFP4.name)
        return codes, scales


def graph(x: Tensor, scale: float = 1e-3, *, dynamic: bool = False) -> GraphModule:
    return graph_of(Quantize(scale), x, dynamic_shapes=({0: DYNAMIC},) if dynamic else None)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bytes_stay(to: torch.dtype, dynamic: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 64).to(to)
    x[0, 0], x[1, 1, :16] = 0, 1e-9
    gm = graph(x, dynamic=dynamic)
    rewrites(SpellOutFp4Codes, gm, x[:4] if dynamic else x)
    assert count(gm, DYNAMIC_QUANTIZE) == 0


def test_ties_and_signs() -> None:
    halfway = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    ties = torch.tensor([6.0, *halfway, *(-x for x in halfway), -0.0])
    gm = graph(ties[None], 1.0)
    rewrites(SpellOutFp4Codes, gm, ties[None])
    assert np.array_equal(unpacked(run(gm, ties[None])[0]), oracle(ties[None], 1.0)[0])


@functools.cache
def lowered(scale: float) -> GraphModule:
    gm = graph(torch.zeros(2, 32), scale)
    SpellOutFp4Codes()(gm)
    return gm


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, (2, 32), elements=st.floats(-1e3, 1e3, width=32)),
    st.sampled_from([1e-6, 0.0123, 0.1, 1.0]),
)
def test_the_bytes_of_ml_dtypes(x: np.ndarray, scale: float) -> None:
    codes, scales = run(lowered(scale), torch.from_numpy(x))
    want_codes, want_scales = oracle(x, np.float32(scale))
    assert np.array_equal(bits(scales), bits(want_scales)) and np.array_equal(unpacked(codes), want_codes)


def test_other_formats_stay() -> None:
    class Blocks(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            codes, scales = torch.ops.qcompile.dynamic_quantize(x, None, format="fp8_1x128")
            return codes, scales

    assert declines(SpellOutFp4Codes, graph_of(Blocks(), torch.randn(2, 128))) == []


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    from passes import ir

    x = torch.randn(4, 64)
    gm = graph(x)
    want = run(gm, x)
    SpellOutFp4Codes()(gm)
    table = {**select_decomp_table(), ir.QUANTIZE: ir.quantize, ir.DEQUANTIZE: ir.dequantize}
    with torch.no_grad():
        got = compile_fx(torch.fx.GraphModule(gm, gm.graph), [x], decompositions=table)(x)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))
