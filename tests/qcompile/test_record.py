"""The record of a program, saved and loaded with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import qcompile
from qcompile.record import QuantizeRecord, record_of

NARROW = nn.Linear(24, 32)  # which NVFP4 does not fit


def program() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=64)
    x = torch.randn(3, 24)
    model = nn.Sequential(NARROW, nn.Linear(32, 4)).eval()
    return qcompile.quantize(
        model, (x,), recipe="nvfp4", calibration=[(x,)], dynamic_shapes=({0: batch},), progress=False
    )


def test_it_survives_saving(tmp_path: Path) -> None:
    made = program()
    torch.export.save(made, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2")
    found = record_of(loaded)
    assert found == record_of(made)
    assert found.recipe == "nvfp4" and found.calibration == "3 samples" and [*found.dimensions.values()] == ["batch"]
    assert found.declined[0].module == "0" and found.headroom and found.fired["InsertQdq"] == 2
    reports = [qcompile.export_onnx(p, tmp_path / "m.onnx", target="portable") for p in (made, loaded)]
    assert reports[0].to_json() == reports[1].to_json()


def test_a_program_of_another_has_none() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for model in (nn.Linear(4, 4), Same()):
        assert record_of(torch.export.export(model, (torch.randn(2, 4),))) == QuantizeRecord()
