"""FP4 without packing and without tables."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_PER_TOKEN, NVFP4
from passes.graph import aten
from passes.ir import DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.cpu.fp4_activations import RoundFp4Activations
from passes.lower.fp4_weights import DecodeFp4Weights
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import insert

G = torch.tensor(0.0005)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def quantized(
    module: nn.Module, *inputs: Any, operands: tuple[str, ...] = ("input", "weight"), scale: Tensor = G, **options: Any
) -> GraphModule:
    gm = graph_of(module, *inputs, **options)
    insert(gm, dict.fromkeys(operands, scale), NVFP4)
    FoldWeights()(gm)
    return gm


class Fork(nn.Module):
    """Two layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 4), nn.Linear(48, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(2, 3), (5,), ()], ids=str)
def test_activations_bit_for_bit(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*lead, 48).to(dtype)
    gm = quantized(Fork().to(dtype), x, operands=("input",))
    rewrites(RoundFp4Activations, gm, x)
    assert count(gm, DYNAMIC_QUANTIZE) == 0
    assert count(gm, QUANTIZE) == 1  # of the block scales


class Identity(nn.Module):
    """A layer that shows what became of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)
        self.layer.weight = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_every_tie_and_neighbour_against_ml_dtypes() -> None:
    """In blocks whose largest number is 6, so that the scale is 1."""
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    around = [np.nextafter(np.float32(v), np.float32(to)) for v in (*E2M1, *ties) for to in (-9, 9)]
    values = np.array([*E2M1, *ties, *around], np.float32).clip(-6, 6)
    values = np.concatenate([values, -values])
    blocks = np.zeros((-(-len(values) // 15), 16), np.float32)
    blocks[:, 0] = 6
    blocks[:, 1:].flat[: len(values)] = values
    gm = quantized(Identity(16), torch.zeros(1, 16), operands=("input",), scale=torch.tensor(1.0))
    gm = quantized(Identity(16), torch.from_numpy(blocks), operands=("input",), scale=torch.tensor(1.0))
    rewrites(RoundFp4Activations, gm, torch.from_numpy(blocks))
    (got,) = run(gm, torch.from_numpy(blocks))
    np.testing.assert_array_equal(got.detach().numpy(), blocks.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.slow
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    magnitude=st.sampled_from([0.0, 1e-40, 1e-20, 1e-3, 1.0, 1e3, 1e30]),
    global_scale=st.sampled_from([1e-6, 5e-4, 1.0]),
)
def test_every_size_and_magnitude(rows: int, blocks: int, magnitude: float, global_scale: float) -> None:
    x = torch.randn(rows, 16 * blocks) * magnitude
    x[0, :16] = 0.0
    gm = quantized(Identity(16 * blocks), x, operands=("input",), scale=torch.tensor(global_scale))
    rewrites(RoundFp4Activations, gm, x)


def test_nan_and_infinity_in_activations() -> None:
    x = torch.randn(3, 48)
    x[0, 5], x[1, 20] = float("nan"), float("inf")
    gm = quantized(Fork(), x, operands=("input",))
    rewrites(RoundFp4Activations, gm, x)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("axes", [{0: DYNAMIC}, {1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}], ids=str)
def test_dynamic_batch_and_length(axes: dict[int, Any]) -> None:
    gm = quantized(Fork(), torch.randn(2, 3, 48), dynamic_shapes=(axes,))
    x = torch.randn(5 if 0 in axes else 2, 7 if 1 in axes else 3, 48)
    rewrites(RoundFp4Activations, gm, x)
    rewrites(DecodeFp4Weights, gm, x, fired=2, rtol=1e-6, atol=1e-6)


def test_other_formats_stay() -> None:
    gm = graph_of(nn.Linear(32, 4), torch.randn(2, 3, 32))
    sites = {site: site.operand for site in find_sites(gm)}
    chosen = {
        s: Quantizer(*{"input": (FP8_PER_TOKEN, None), "weight": (FP8, G)}[o])
        for s, o in sites.items()
        if o != "output"
    }
    InsertQdq(chosen)(gm)
    FoldWeights()(gm)
    assert declines(RoundFp4Activations, gm) == []
    assert declines(DecodeFp4Weights, gm) == []


@pytest.mark.slow
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_weights_are_the_same_numbers(rows: int, blocks: int, seed: int) -> None:
    """Read through unit vectors, so that no sum hides anything."""
    torch.manual_seed(seed)
    width = 16 * blocks
    gm = quantized(nn.Linear(width, rows, bias=False), torch.eye(width), operands=("weight",))
    rewrites(DecodeFp4Weights, gm, torch.eye(width))


def test_weights_keep_their_size_and_the_old_codes_go() -> None:
    x = torch.randn(3, 64)
    gm = quantized(nn.Linear(64, 10), x, operands=("weight",))
    before = {name: tensor.nbytes for name, tensor in gm.state_dict().items()}
    rewrites(DecodeFp4Weights, gm, x, rtol=1e-6, atol=1e-6)
    after = {name: tensor.nbytes for name, tensor in gm.state_dict().items()}
    assert sum(after.values()) == sum(before.values())
    assert count(gm, aten.linear.default) == 1


def test_layers_that_share_a_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())  # type: ignore[no-any-return]

    x = torch.randn(3, 32)
    gm = quantized(Twice(), x, operands=("weight",))
    fired = len({node.args[1] for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)})
    rewrites(DecodeFp4Weights, gm, x, fired=fired, rtol=1e-6, atol=1e-6)


def test_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight)

    x = torch.randn(3, 4, 32)
    for scale in (G, torch.tensor([3e-4, 5e-4, 7e-4]).view(3, 1, 1)):
        gm = graph_of(Experts(), x)
        insert(gm, {"weight": scale}, NVFP4)
        FoldWeights()(gm)
        rewrites(DecodeFp4Weights, gm, x, rtol=1e-6, atol=1e-6)
