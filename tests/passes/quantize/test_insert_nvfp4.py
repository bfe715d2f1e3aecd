"""NVFP4 on chosen edges: the chain of two levels, and both operands of a layer or neither."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.constants import constant
from passes.formats import FP8, NVFP4
from passes.graph import is_call
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site, find_sites
from passes.testing import DYNAMIC, count, graph_of, only_call, run
from tests.nvfp4 import global_scale, rounded
from tests.passes.support import Mlp, insert

G = torch.tensor(0.0007)
both = {"input": G, "weight": G}


def inserted(gm: GraphModule, choose: Callable[[Site], Quantizer | None]) -> InsertQdq:
    chosen = {site: quantizer for site in find_sites(gm) if (quantizer := choose(site)) is not None}
    instance = InsertQdq(chosen)
    instance(gm)
    return instance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_operands_get_the_chain_of_two_levels(dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 4, bias=False).to(dtype)
    gm = graph_of(layer, torch.randn(3, 32, dtype=dtype), dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {"input": G, "weight": torch.tensor(0.0001)}, NVFP4)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE), count(gm, QUANTIZE)) == (2, 4, 0)
    assert {name: (t.item(), t.dtype) for name, t in gm.named_buffers()} == {
        "input_global_scale": (G.item(), torch.float32),
        "weight_global_scale": (torch.tensor(0.0001).item(), torch.float32),
    }
    x = torch.randn(7, 32, dtype=dtype)
    wide = [
        torch.from_numpy(rounded(t.detach().float().numpy(), g)).to(dtype) for t, g in ((x, G), (layer.weight, 1e-4))
    ]
    torch.testing.assert_close(run(gm, x)[0], nn.functional.linear(*wide), rtol=0, atol=0)


def test_quantize_and_dequantize_share_the_global_scale() -> None:
    gm = graph_of(nn.Linear(32, 4), torch.randn(3, 32))
    insert(gm, both, NVFP4)
    for node in gm.graph.find_nodes(op="call_function", target=DYNAMIC_QUANTIZE):
        (inner,) = [n for part in node.users for n in part.users if n.kwargs["format"] == "fp8"]
        assert node.args[1] is inner.args[1]
        assert inner.kwargs["dtype"] is torch.float32


def test_layers_with_one_input_share_its_codes_and_a_residual_keeps_the_floats() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x), x

    x = torch.randn(3, 32)
    gm = graph_of(Fork(), x)
    insert(gm, both, NVFP4)
    assert count(gm, DYNAMIC_QUANTIZE) == 3
    assert torch.equal(run(gm, x)[2], x)


@pytest.mark.parametrize("width", [8, 24, 250])
@pytest.mark.parametrize("operands", [("weight", "input"), ("weight",)], ids="+".join)
def test_a_width_that_16_does_not_divide_is_declined_for_both_operands(width: int, operands: tuple[str, ...]) -> None:
    x = torch.randn(3, width)
    gm = graph_of(nn.Sequential(nn.Linear(width, 32), nn.Linear(32, 4)), x, dynamic_shapes=({0: DYNAMIC},))
    pass_ = inserted(gm, lambda site: Quantizer(NVFP4, G) if site.operand in operands else None)
    reason = f"nvfp4 has blocks of 16 elements, and the reduction axis has {width}"
    assert [(d.reason, d.module) for d in pass_.log.declined] == [(reason, "0")] * len(operands)
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert not any(is_call(operand, DEQUANTIZE) for operand in first.args)
    assert [is_call(operand, DEQUANTIZE) for operand in second.args[:2]] == ["input" in operands, True]


def test_an_operand_that_is_quantized_already_is_left() -> None:
    gm = graph_of(nn.Linear(32, 4), torch.randn(3, 32))
    insert(gm, {"input": G}, NVFP4)
    code = gm.code
    again = inserted(gm, lambda site: Quantizer(NVFP4, G) if site.operand == "input" else None)
    reasons = [decline.reason for decline in again.log.declined]
    assert reasons == ["this tensor is quantized already, by the output quantizer before it"]
    gm.recompile()
    assert gm.code == code


def test_two_formats_for_one_tensor_are_two_chains() -> None:
    """FP8 projections and an NVFP4 MLP behind one norm."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    gm = graph_of(Fork(), torch.randn(3, 32))
    inserted(gm, lambda s: Quantizer(FP8 if s.module == "a" else NVFP4, G) if s.operand in both else None)
    assert (count(gm, QUANTIZE), count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE)) == (2, 2, 6)


def test_an_mlp_is_close_to_the_float_one() -> None:
    gm, x = graph_of(Mlp(64, 128), torch.randn(16, 64)), torch.randn(16, 64)
    (expected,) = run(gm, x)

    def scale(site: Site) -> Tensor | None:
        weight = constant(gm, site.tensor)
        values = weight.detach() if weight is not None else 3 * torch.ones(1)
        return global_scale(values) if site.operand in both else None

    insert(gm, scale, NVFP4)
    (found,) = run(gm, x)
    error = float((found - expected).norm() / (expected - x).norm())
    assert 0.02 < error < 0.25
    assert np.isfinite(error)


def test_experts_are_quantized_along_their_last_axis() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight)

    module, x = Experts(), torch.randn(3, 4, 32)
    gm = graph_of(module, x)
    insert(gm, both, NVFP4)
    operands = [torch.from_numpy(rounded(t.detach().numpy(), G)) for t in (x, module.weight)]
    torch.testing.assert_close(run(gm, x)[0], operands[0] @ operands[1].transpose(-1, -2), rtol=0, atol=0)
    assert only_call(gm, torch.ops.qcompile.batched_linear.default).args[0].op == "call_function"  # type: ignore[union-attr]
