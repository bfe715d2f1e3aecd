"""The table of operators: what it says of each, and that a row is all that a new one takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.constants import is_constant_expression
from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8
from passes.graph import aten
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, QUANTIZE
from passes.operators import (
    OPERATORS,
    SUFFIXES,
    TRANSPOSED,
    Operator,
    counted_kinds,
    operator_of,
    quantizable,
    refusals,
)
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.reading import QuantizedLayer
from passes.sdpa import SDPA
from passes.testing import blank, count, graph_of, only_call, run
from qcompile.recipe.globs import KINDS


def test_rows_name_operands_that_recipes_know() -> None:
    assert set(SUFFIXES.values()) == set(KINDS)
    for target, row in OPERATORS.items():
        assert set(row.operands) <= set(SUFFIXES)
        assert bool(row.operands) != bool(row.refusal), target  # it can be quantized, or says why not
    assert counted_kinds() == ("linear", "experts", "convolution", "attention", "cache")
    assert {aten.linear.default, BATCHED_LINEAR, aten.convolution.default, SDPA} <= set(quantizable())
    assert refusals() == {row.kind: row.refusal for row in (*OPERATORS.values(), TRANSPOSED) if row.refusal}


def test_a_size_that_is_added_to_a_tensor_is_no_skip_branch() -> None:
    """The length of a cache is a tensor, and grows by the number of new tokens."""

    class Longer(nn.Module):
        def forward(self, x: Tensor, length: Tensor) -> Tensor:
            return length.add(x.shape[0])

    length = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Longer(), (torch.randn(3, 4), torch.tensor(2)), dynamic_shapes=(length, {}))
    add = only_call(program.graph_module, aten.add.Tensor)
    row = operator_of(add)
    assert isinstance(add.args[1], torch.fx.Node) and row is not None and not row.operands


def test_a_scale_for_each_channel_stands_for_so_many_products() -> None:
    _, emit, (x, w, several, experts) = blank(*(torch.ones(s) for s in ((2, 12), (8, 12), (5, 2, 12), (5, 8, 12))))
    linear, batched = emit(aten.linear.default, x, w), emit(BATCHED_LINEAR, several, experts)
    assert [OPERATORS[call.target].reduction(call) for call in (linear, batched)] == [12, 12]
    assert OPERATORS[SDPA].reduction(x) is None


def test_the_skip_branch_of_an_add_is_what_no_convolution_gives() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bias = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Parameter(torch.ones(1, 4, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            read_twice = self.b(x)
            return x + self.a(x), self.a(x) + x, x + read_twice, read_twice.relu(), self.a(x) + self.bias, x + x.relu()

    gm = graph_of(Adds(), torch.randn(1, 4, 8), normalized=True)
    skips = [(site.index, site.tensor.op) for site in find_sites(gm) if site.operand == "residual"]
    assert skips == [(0, "placeholder"), (1, "placeholder")]


class Weights(nn.Module):
    """One of each layer whose weight nothing quantizes, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.both = nn.Embedding(8, 4), nn.Bilinear(4, 4, 4)
        self.states, self.cell = nn.LSTM(4, 4, batch_first=True), nn.GRUCell(4, 4)
        self.window, self.wider = nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)
        self.mix = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.both(x, x) + torch.einsum("bsi,hij->bsj", x, self.mix)
        x = self.states(x)[0] + self.cell(x[:, 0])[:, None]
        result: Tensor = self.wider(self.window(x.transpose(1, 2)))
        return result


def test_what_has_a_weight_and_cannot_be_quantized_says_why() -> None:
    """Of a normalized graph: every reader of a weight that adds products is in the table."""
    gm = graph_of(Weights(), torch.zeros(2, 5, dtype=torch.long), normalized=True)
    readers = [n for n in gm.graph.nodes if any(i.op == "get_attr" for i in n.all_input_nodes)]
    rows = [row for row in map(operator_of, readers) if row is not None]
    refused = {row.kind for row in rows if row.refusal}
    assert refused >= {"embedding", "bilinear", "recurrent", "transposed_convolution"}
    assert "convolution" in {row.kind for row in rows if not row.refusal}


NEW = Operator(
    "new",
    {"input": 0, "weight": 1, "output": None},
    counted=True,
    channel_axis=lambda call: 1 if call.args[6] else 0,
)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_one_more_row_is_enough(transposed: bool, per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as if they had none: sites by name, quantizers, codes for the weight, and the layer is read."""
    monkeypatch.setitem(OPERATORS, aten.convolution.default, NEW)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ConvTranspose2d(4, 6, 3) if transposed else nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.stem.weight, self.stem.bias
            two: Any = ([1, 1], [0, 0], [1, 1])
            result: Tensor = torch.ops.aten.convolution(x, weight, bias, *two, transposed, [0, 0], 1)
            return result

    x, net = torch.randn(2, 4, 8, 8), Net()
    gm = graph_of(net, x)
    sites = {site.operand: site for site in find_sites(gm)}
    assert [site.name for site in sites.values()] == [f"stem.{SUFFIXES[o]}" for o in ("input", "weight", "output")]
    assert "new" in counted_kinds() and sites["weight"].idle is None
    assert NEW.reduction(sites["weight"].consumer) == 4 * 9
    axis = 1 if transposed else 0
    amax = net.stem.weight.detach().abs().amax([d for d in range(4) if d != axis], keepdim=True)
    scale = (amax if per_channel else amax.amax()) / INT8.max
    InsertQdq({sites["weight"]: Quantizer(INT8, scale), sites["input"]: Quantizer(FP8, torch.tensor(0.01))})(gm)
    expected = run(gm, x)
    if scale.ndim == 0 or axis == 0:  # `ConstantRows` cuts a scale along the first axis
        FoldWeights()(gm)
        torch.testing.assert_close(run(gm, x), expected, rtol=0, atol=0)
        layer = QuantizedLayer.read(only_call(gm, aten.convolution.default))
        assert layer is not None and is_constant_expression(layer.weight.codes)
        assert (layer.weight.format, layer.x.format, layer.name) == (INT8, FP8, "stem")
    assert count(gm, DEQUANTIZE) == 2 and count(gm, QUANTIZE) >= 1
