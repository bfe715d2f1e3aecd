"""What algorithms see of a graph: the largest magnitude of weights, and which weights share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from passes.place.rotate import RotateLinears
from passes.quantize.sites import Site, find_sites
from passes.testing import graph_of
from qcompile.quantization.view import graph_view
from qcompile.recipe import QuantizerConfig

FP8 = QuantizerConfig("fp8", "per_tensor", (), dynamic=False)
NVFP4 = QuantizerConfig("nvfp4", "per_block", (1, 16), dynamic=True)


def weight_amax(configs: Mapping[Site, QuantizerConfig]) -> dict[Site, Tensor]:
    gm = next(iter(configs)).consumer.graph.owning_module
    assert gm is not None
    view = graph_view(gm, configs, torch.float32)
    return {operand.site: view.amax(operand) for operand in view.weights}


class Block(nn.Module):
    """q and k read one tensor, as do gate and up; down another; `other.a` belongs to another module."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.gate, self.up, self.down = (nn.Linear(16, 16) for _ in range(5))
        self.other = nn.Sequential(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return self.q(x), self.k(x), self.other(x), self.down(self.gate(y) * self.up(y))


@pytest.mark.parametrize("config", [FP8, NVFP4], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("rotated", [False, True])
def test_siblings_share_the_largest(config: QuantizerConfig, rotated: bool) -> None:
    module = Block()
    gm = graph_of(module, torch.randn(3, 16))
    if rotated:
        RotateLinears([site.consumer for site in find_sites(gm)])(gm)
    amax = {
        site.module: value.item()
        for site, value in weight_amax({s: config for s in find_sites(gm) if s.operand == "weight"}).items()
    }
    assert amax["q"] == amax["k"] and amax["gate"] == amax["up"]
    assert len(set(amax.values())) == 4
    if not rotated:
        own = {name: module.get_submodule(name).weight.abs().max().item() for name in ("q", "k", "gate", "up", "down")}
        assert (amax["q"], amax["gate"]) == (max(own["q"], own["k"]), max(own["gate"], own["up"]))
        assert (amax["down"], amax["other.0"]) == (own["down"], module.other[0].weight.abs().max().item())


def test_siblings_in_different_formats_do_not_share() -> None:
    module = Block()
    gm = graph_of(module, torch.randn(3, 16))
    sites = {s.module: s for s in find_sites(gm) if s.operand == "weight"}
    amax = weight_amax({sites["q"]: FP8, sites["k"]: NVFP4})
    for name in "qk":
        assert amax[sites[name]] == module.get_submodule(name).weight.abs().max()


def test_a_scale_per_channel_is_nobody_elses() -> None:
    gm = graph_of(Block(), torch.randn(3, 16))
    per_channel = replace(FP8, granularity="per_channel")
    amax = weight_amax({s: per_channel for s in find_sites(gm) if s.operand == "weight"})
    assert {tuple(value.shape) for value in amax.values()} == {(16, 1)}


def test_experts_have_one_global_scale_and_a_scale_for_each_channel() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight)

    module = Experts()
    gm = graph_of(module, torch.randn(3, 4, 32))
    (site,) = (s for s in find_sites(gm) if s.operand == "weight")
    assert weight_amax({site: NVFP4})[site] == module.weight.abs().max()
    per_channel = weight_amax({site: replace(FP8, granularity="per_channel")})[site]
    assert torch.equal(per_channel, module.weight.detach().abs().amax(-1, keepdim=True))
