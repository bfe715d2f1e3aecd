"""The operands that a recipe can name, and how they are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten
from passes.ir import BATCHED_LINEAR
from passes.normalize.linear import NormalizeLinear
from passes.quantize.sites import find_sites, linear_name
from passes.sdpa import SDPA
from passes.testing import graph_of, only_call
from tests.passes.support import Attention, Mlp, insert


def names(module: nn.Module, *args: Tensor) -> list[str]:
    return [site.name for site in find_sites(graph_of(module, *args))]


def test_a_linear_layer_has_three_sites() -> None:
    assert names(nn.Sequential(Mlp()), torch.randn(2, 8)) == [
        f"0.{layer}.{operand}_quantizer" for layer in ("up", "down") for operand in ("input", "weight", "output")
    ]


def test_a_layer_at_the_top_has_no_path() -> None:
    assert names(nn.Linear(4, 4), torch.randn(2, 4)) == ["input_quantizer", "weight_quantizer", "output_quantizer"]


def test_an_attention_has_four_sites_after_its_projections() -> None:
    found = names(nn.Sequential(Attention()), torch.randn(1, 3, 16))
    assert found[-4:] == [f"0.{operand}_bmm_quantizer" for operand in ("q", "k", "v", "softmax")]
    assert len(found) == 13


def test_the_sites_of_an_attention_see_its_operands() -> None:
    gm = graph_of(Attention(), torch.randn(1, 3, 16))
    node = only_call(gm, SDPA)
    tensors = {site.operand: site.tensor for site in find_sites(gm) if site.consumer is node}
    assert tensors == {"q": node.args[0], "k": node.args[1], "v": node.args[2], "softmax": node}


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=lambda n: type(n).__name__)
def test_a_norm_can_be_quantized_at_its_output(norm: nn.Module) -> None:
    (site,) = find_sites(graph_of(nn.Sequential(norm), torch.randn(2, 8)))
    assert (site.name, site.module_class) == (
        "0.output_quantizer",
        f"torch.nn.modules.normalization.{type(norm).__name__}",
    )
    assert site.tensor is site.consumer


def test_a_module_that_is_called_twice_has_two_sites_of_one_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    sites = [site for site in find_sites(graph_of(Twice(), torch.randn(2, 4))) if site.operand == "input"]
    assert [site.name for site in sites] == ["layer.input_quantizer"] * 2
    assert len(set(sites)) == 2


class Functional(nn.Module):
    """Layers that are called by function, named by their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(4, 4))
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.in_proj_weight)
        return nn.functional.linear(x, self.w) @ self.in_proj_weight


def test_functional_layers_are_named_by_their_weight() -> None:
    gm = graph_of(nn.Sequential(Functional()), torch.randn(2, 4))
    NormalizeLinear()(gm)
    assert [site.module for site in find_sites(gm) if site.operand == "weight"] == ["0.in_proj", "0.w", "0.in_proj"]


def test_a_product_of_activations_has_no_site() -> None:
    class Activations(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.linear(x, w)

    assert names(Activations(), torch.randn(2, 4), torch.randn(3, 4)) == []


def test_the_name_is_still_known_when_the_weight_is_quantized() -> None:
    gm = graph_of(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    insert(gm, {"weight": torch.tensor(0.1)})
    gm.recompile()
    # before the codes are folded the weight is behind a quantize, and the module is all that is known
    assert linear_name(only_call(gm, aten.linear.default)) == "0"


def test_the_experts_of_a_mixture_are_named_by_their_weight() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return BATCHED_LINEAR(x.unsqueeze(0), self.gate_up_proj)

    gm = graph_of(nn.Sequential(Experts()), torch.randn(2, 4))
    sites = find_sites(gm)
    assert [site.name for site in sites] == [
        f"0.gate_up_proj.{operand}_quantizer" for operand in ("input", "weight", "output")
    ]
    assert all((site.module_class or "").endswith("Experts") for site in sites)
