"""Codes and block scales that somebody chose: in the graph as they are, under the names that `FoldWeights` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.base import run_pipeline
from passes.codes import write_codes
from passes.constants import constant
from passes.errors import PassError
from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_128X128, INT8, NVFP4, Format
from passes.graph import calls, module_path
from passes.ir import DEQUANTIZE
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import graph_of, run

X, G = torch.randn(3, 32), torch.tensor(0.002)


class Net(nn.Module):
    """a and b share a weight, which has the name of b; c reads the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sin()) + self.c(x)


def quantizer(fmt: Format, scale: float = 0.01, seed: int = 0) -> Quantizer:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x70, (32, 16 if fmt.packed else 32), generator=random, dtype=torch.uint8)
    if fmt is NVFP4:
        blocks = torch.randint(1, 0x70, (32, 2), generator=random, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return Quantizer(fmt, G, blocks, codes)
    if fmt is FP8_128X128:
        return Quantizer(fmt, None, torch.full((1, 1), scale), codes.view(fmt.storage))
    return Quantizer(fmt, torch.tensor(scale), codes=codes.view(fmt.storage))


def state(quantizers: dict[str, Quantizer]) -> tuple[Any, dict[str, Tensor]]:
    gm = graph_of(Net(), X)
    sites = {site: quantizers[module_path(site.consumer)] for site in find_sites(gm) if site.operand == "weight"}
    run_pipeline((lambda: InsertQdq(sites), FoldWeights), gm)
    found = {}
    for node in calls(gm.graph, DEQUANTIZE):
        for operand in node.args[:2]:
            if (tensor := constant(gm, operand)) is not None:
                found[str(operand.target)] = tensor.detach()
    return gm, found


@pytest.mark.parametrize("fmt", [FP8, INT8, NVFP4, FP8_128X128], ids=lambda f: f.name)
def test_chosen_codes_stay_and_have_the_names_of_others(fmt: Format) -> None:
    ours = {name: quantizer(fmt, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))}
    plain = {name: Quantizer(fmt, chosen.scale) for name, chosen in ours.items()}
    gm, found = state(ours)
    _, others = state(plain)
    assert list(found) == list(others) and "b.weight" in found and "c.weight" in found
    for name in "bc":
        assert ours[name].codes is not None
        assert torch.equal(found[f"{name}.weight"].view(torch.uint8), ours[name].codes.view(torch.uint8))
    if fmt.sizes:
        blocks = [t for n, t in found.items() if n.endswith("weight_scale" if fmt is FP8_128X128 else "block_scale")]
        for name, stored in zip("ac", blocks, strict=True):
            chosen = ours[name].block_scales
            assert chosen is not None and torch.equal(stored.float(), chosen.float())
    assert "a.weight" not in {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert torch.isfinite(run(gm, X)[0]).all()


@pytest.mark.parametrize("fmt", [NVFP4, FP8_128X128], ids=lambda f: f.name)
def test_chosen_block_scales_get_the_nearest_codes(fmt: Format) -> None:
    chosen = quantizer(fmt)
    quantizers = dict.fromkeys("abc", Quantizer(fmt, chosen.scale, chosen.block_scales))
    _, found = state(quantizers)
    weight = Net().c.weight.detach()
    codes = torch.empty_like(found["c.weight"])
    write_codes([(slice(0, 32), weight)], fmt, codes, chosen.scale, chosen.block_scales, chosen=True)
    assert torch.equal(found["c.weight"].view(torch.uint8), codes.view(torch.uint8))


def test_readers_of_one_weight_share_what_is_the_same_and_nothing_else() -> None:
    _, found = state({"a": quantizer(FP8), "b": quantizer(FP8), "c": quantizer(FP8)})
    assert sorted(found) == ["b.weight", "b.weight_scale", "c.weight", "c.weight_scale"]
    _, found = state({"a": quantizer(FP8), "b": quantizer(FP8, seed=2), "c": quantizer(FP8)})
    assert len([name for name in found if "scale" not in name]) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Quantizer(FP8, G, codes=torch.zeros(32, 32)), "its codes are torch.float32"),
        (Quantizer(INT8, G, codes=torch.zeros(32, 31, dtype=torch.int8)), r"\[32, 31\], not torch.int8 \[32, 32\]"),
        (Quantizer(NVFP4, G, codes=torch.zeros(32, 16, dtype=torch.uint8)), "come with the scales of their blocks"),
        (Quantizer(FP8, G, torch.ones(32, 2)), "fp8 has no blocks"),
        (Quantizer(NVFP4, G, torch.ones(32, 2)), "its block scales are torch.float32"),
    ],
)
def test_codes_that_do_not_fit_are_an_error(wrong: Quantizer, message: str) -> None:
    with pytest.raises(PassError, match=rf"b\.weight_quantizer: .*{message}"):
        state(dict.fromkeys("abc", wrong))
