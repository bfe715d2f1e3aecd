"""NVFP4 weights are stored as bytes and block scales, whatever they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.constants import ConstantRows
from passes.fold.weights import FoldWeights
from passes.formats import FP8, NVFP4
from passes.hadamard import hadamard
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.place.rotate import RotateLinears
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.nvfp4 import bits, oracle, unpacked
from tests.passes.support import Mlp, insert, scale_of

G = torch.tensor(0.0001)


def stored(gm: GraphModule, name: str = "weight") -> tuple[np.ndarray, np.ndarray]:
    """Codes, one a byte, and bits of the block scales of a folded weight."""
    scales = gm.get_parameter(name.replace("weight", "weight_block_scale"))
    return unpacked(gm.get_parameter(name).detach()), bits(scales.detach())


def assert_codes(gm: GraphModule, weight: Tensor, name: str = "weight", g: Tensor = G) -> None:
    codes, scales = oracle(weight.detach().float().numpy(), g)
    for found, expected in zip(stored(gm, name), (codes, bits(scales)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_codes_and_block_scales_take_the_name_of_the_weight() -> None:
    module = Mlp(16, 32)
    gm = graph_of(module, torch.randn(2, 16), dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, torch.randn(3, 16), fired=2)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE)) == (0, 4)
    assert {name: (tuple(t.shape), t.dtype) for name, t in gm.state_dict().items() if name.startswith("up.w")} == {
        "up.weight": ((32, 8), torch.uint8),
        "up.weight_block_scale": ((32, 1), torch.float8_e4m3fn),
        "up.weight_global_scale": ((), torch.float32),
    }
    assert len(gm.state_dict()) == 8
    for name in ("up", "down"):
        assert_codes(gm, module.get_submodule(name).weight, f"{name}.weight")
    assert module.up.weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_weight(dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 8).to(dtype)
    gm = graph_of(layer, torch.randn(2, 48, dtype=dtype))
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, torch.randn(2, 48, dtype=dtype))
    assert_codes(gm, layer.weight)


def test_the_pieces_that_a_large_weight_is_folded_in_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConstantRows, "_CHUNK", 200)
    layer = nn.Linear(64, 31)
    gm = graph_of(layer, torch.randn(2, 64))
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, torch.randn(2, 64))
    assert_codes(gm, layer.weight)


class Experts(nn.Module):
    """A weight [E, N, K], stored the other way round by some models."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 32, 6) if transposed else torch.randn(3, 6, 32))

    def matrix(self) -> Tensor:
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qcompile.batched_linear(x, self.matrix())


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_experts(transposed: bool) -> None:
    module, x = Experts(transposed), torch.randn(3, 4, 32)
    gm = graph_of(module, x)
    insert(gm, {"weight": G}, NVFP4)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if transposed else {}  # laid out anew, it adds up in another order
    rewrites(FoldWeights, gm, x, **tolerance)
    assert gm.get_parameter("weight").shape == (3, 6, 16)
    assert_codes(gm, module.matrix())


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_experts_in_fp8(per_channel: bool) -> None:
    module, x = Experts(), torch.randn(1, 4, 32)
    gm = graph_of(module, x)
    amax = module.weight.detach().abs().amax(-1, keepdim=True)
    insert(gm, {"weight": amax / 448 if per_channel else scale_of(module.weight.detach())}, FP8)
    rewrites(FoldWeights, gm, x)
    assert (gm.get_parameter("weight").dtype, gm.get_parameter("weight").shape) == (torch.float8_e4m3fn, (3, 6, 32))


def test_a_rotated_weight_is_rounded_once() -> None:
    """In float32 from the rotation on, though the model is in half precision."""
    layer = nn.Linear(96, 8, bias=False).half()
    gm = graph_of(layer, torch.randn(2, 96).half())
    RotateLinears([site.consumer for site in find_sites(gm)])(gm)
    insert(gm, {"weight": G}, NVFP4)
    FoldWeights()(gm)
    assert_codes(gm, hadamard(layer.weight))


def test_two_layers_with_one_weight_share_its_codes() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(2, 32)
    gm = graph_of(Repeated(), x)
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, x)
    names = {name for name, t in gm.state_dict().items() if t.dtype in (torch.uint8, torch.float8_e4m3fn)}
    assert names == {"layer.weight", "layer.weight_block_scale"}


def test_parallel_layers_lie_side_by_side_in_memory() -> None:
    """So that what merges them copies nothing; a layer with another input has memory of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return self.k(x) + self.out(q)

    gm = graph_of(Block(), torch.randn(2, 32))
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, torch.randn(2, 32), fired=3)
    for name in ("weight", "weight_block_scale"):
        q, k, out = (gm.get_parameter(f"{layer}.{name}") for layer in ("q", "k", "out"))
        assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
        assert q.untyped_storage().nbytes() == (q.numel() + k.numel()) * q.element_size()
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


def test_a_tied_weight_stays_beside_its_codes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 16)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            return nn.functional.linear(x, self.embed.weight), x

    ids = torch.arange(3)
    gm = graph_of(Tied(), ids)
    embedded = run(gm, ids)[1]
    insert(gm, {"weight": G}, NVFP4)
    rewrites(FoldWeights, gm, ids)
    assert {n: p.dtype for n, p in gm.named_parameters() if "scale" not in n} == {
        "embed.weight": torch.float32,
        "embed.weight_1": torch.uint8,
    }
    assert torch.equal(run(gm, ids)[1], embedded)


def test_activations_are_left_to_run_time() -> None:
    gm = graph_of(Mlp(16, 16), torch.randn(2, 16))
    insert(gm, {"input": G}, NVFP4)
    assert declines(FoldWeights, gm) == []
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, QUANTIZE)) == (2, 0)
