"""Everything that has a weight is in a list of the report: quantized, or not with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.report.program import ProgramReport

RULES: dict[str, Any] = {
    "metadata": {"name": "int8", "description": "INT8 for all that can be"},
    "rules": [
        {"quantizer": "*.weight_quantizer", "format": "int8"},
        {"quantizer": "*.input_quantizer", "format": "int8"},
        {"quantizer": "*.left.*", "enable": False},
    ],
}


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.both = nn.Embedding(8, 8), nn.Bilinear(8, 8, 8)
        self.states, self.cell = nn.LSTM(8, 8, batch_first=True), nn.GRUCell(8, 8)
        self.window, self.left, self.wider = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 5)
        self.bare = nn.Parameter(torch.randn(8, 8, 3) / 5)
        self.mix, self.head = nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.both(x, x) + torch.einsum("bsi,hij->bsj", x, self.mix)
        x = self.states(x)[0] + self.cell(x[:, 0])[:, None]
        x = self.wider(self.left(self.window(x.transpose(1, 2))))
        x = torch.nn.functional.conv_transpose1d(x, self.bare, padding=1)
        result: Tensor = self.head(x.transpose(1, 2))
        return result


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_every_weight_is_in_a_list() -> None:
    torch.manual_seed(0)
    model, ids = Zoo().eval(), torch.randint(0, 8, (2, 9))
    program = qcompile.quantize(model, (ids,), recipe=RULES, calibration=[ids], progress=False)
    report = ProgramReport.of(program)
    owners = {name.rpartition(".")[0] or name for name, p in model.named_parameters() if p.ndim > 1}  # counted apart
    listed = {*report.quantized, *report.unquantized}
    assert owners <= {path.removesuffix(".weight") for path in listed}, owners - listed
    assert report.quantized["window"] == report.quantized["head"] == "int8"
    kinds = {"table": "embedding", "both": "bilinear", "states": "recurrent", "wider": "transposed_convolution"}
    assert kinds.items() <= report.unquantized.items() and report.unquantized["bare"] == "transposed_convolution"
    assert report.unquantized["left"] == "convolution" and report.coverage["convolution"] == (1, 2)
    assert set(report.unquantized) - set(report.reasons) == {"left"}  # which the recipe leaves out
    assert "half precision" in report.reasons["wider"] and "looked up" in report.reasons["table"]
    assert "looked up" in str(report).replace("\n", " ")
