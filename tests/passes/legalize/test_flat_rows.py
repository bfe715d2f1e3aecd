"""NVFP4 linear layers on a matrix, whatever the batch axes are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import FP8_PER_TOKEN, NVFP4, Format
from passes.graph import aten, shape
from passes.ir import DYNAMIC_QUANTIZE
from passes.legalize.flat_rows import FlattenRows
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites
from tests.passes.support import insert

G = torch.tensor(0.0005)


def quantized(
    module: nn.Module, *inputs: Tensor, operands: tuple[str, ...] = ("input", "weight"), **options: Any
) -> GraphModule:
    gm = graph_of(module, *inputs, **options)
    insert(gm, dict.fromkeys(operands, G), NVFP4)
    FoldWeights()(gm)
    return gm


class Fork(nn.Module):
    """Two layers read one tensor, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("lead", [(2, 3), (2, 1, 3), (5,), ()], ids=str)
def test_rows_are_flattened_round_the_layer(lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 32)
    gm = quantized(Fork(), x)
    if len(lead) == 1:
        assert declines(FlattenRows, gm) == []
        return
    rewrites(FlattenRows, gm, x)
    quantize = only_call(gm, DYNAMIC_QUANTIZE)
    assert len(shape(quantize.args[0])) == 2  # type: ignore[arg-type]
    assert count(gm, aten.reshape.default) == 3
    assert {len(shape(n)) for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default)} == {2}


@pytest.mark.parametrize("axes", [{0: DYNAMIC}, {1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}], ids=str)
def test_dynamic_batch_and_length(axes: dict[int, Any]) -> None:
    gm = quantized(Fork(), torch.randn(2, 3, 32), dynamic_shapes=(axes,))
    rewrites(FlattenRows, gm, torch.randn(5 if 0 in axes else 2, 7 if 1 in axes else 3, 32))


def test_an_activation_that_a_float_layer_reads_keeps_its_axes() -> None:
    """Rows are flattened behind the producer, so that its other users see no difference."""

    class Residual(Fork):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            x = x.sin()
            return self.a(x), x.cos()

    x = torch.randn(2, 3, 32)
    rewrites(FlattenRows, quantized(Residual(), x), x)


def test_weights_that_stay_in_floats() -> None:
    x = torch.randn(2, 3, 32)
    rewrites(FlattenRows, quantized(Fork(), x, operands=("input",)), x)


def test_another_reader_of_four_axes_is_declined() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, (32,)).sin()

    for lead, reasons in (
        ((2, 2, 3), ["a tensor of 4 axes is read by something else than linear layers"]),
        ((2, 3), []),
    ):
        gm = graph_of(Norm(), torch.randn(*lead, 32))
        insert(gm, {"output": G}, NVFP4)
        assert count(gm, DYNAMIC_QUANTIZE) == 1
        assert declines(FlattenRows, gm) == reasons


def test_experts_keep_their_axis() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight)

    assert declines(FlattenRows, quantized(Experts(), torch.randn(3, 4, 32))) == []


@pytest.mark.parametrize("fmt", [FP8_PER_TOKEN], ids=lambda f: f.name)
def test_formats_of_one_level_keep_their_axes(fmt: Format) -> None:
    gm = graph_of(nn.Linear(32, 4), torch.randn(2, 3, 32))
    InsertQdq({site: Quantizer(fmt, None) for site in find_sites(gm) if site.operand == "input"})(gm)
    assert declines(FlattenRows, gm) == []
