"""Recurrent layers stay in the compute dtype and are listed; linear layers around them are quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.testing import DYNAMIC


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.recurrent = kind(32, 32, **settings)
        self.after = nn.Linear(64 if settings.get("bidirectional") else 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(x))[0])  # type: ignore[no-any-return]


MODELS = {
    "lstm": lambda: Recurrent(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN, batch_first=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_recurrent_layers(name: str, target: str, tmp_path: Path) -> None:
    x = torch.randn(2, 6, 32)
    program = qcompile.quantize(MODELS[name]().eval(), (x,), recipe="fp8", calibration=[x], progress=False)
    path = tmp_path / "model.onnx"
    report = qcompile.export_onnx(program, path, target=target)
    assert report.unquantized == {"recurrent": "recurrent"} and report.coverage == {"linear": (2, 2)}
    (got,) = qcompile.onnx_session(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), program.module()(x), rtol=0.02, atol=0.02)
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        assert qcompile.build_engine(path, target="sm89").gemms["fp8"] == 2


def test_a_recurrent_layer_is_listed(tmp_path: Path) -> None:
    x = torch.randn(2, 6, 32)
    program = qcompile.quantize(
        Recurrent(nn.GRU, batch_first=True).eval(),
        (x,),
        recipe="fp8_per_channel_per_token",
        progress=False,
        dynamic_shapes=({0: DYNAMIC},),
    )
    report = qcompile.export_onnx(program, tmp_path / "model.onnx", target="portable")
    assert report.unquantized == {"recurrent": "recurrent"} and report.coverage == {"linear": (2, 2)}
