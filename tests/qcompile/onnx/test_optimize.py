"""Rewrites of the exported graph keep the numbers: rules of onnxscript that do not are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile


class Rows(nn.Module):
    """Adds to all rows, by an index that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, index = self.layer(x), self.index
        assert isinstance(index, Tensor)
        return y.index_add(0, index, x), y.index_put((index,), x, accumulate=True)


class Heads(nn.Module):
    """Multiplies head by head, with as many blocks as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.keys = nn.Linear(32, 32), nn.Parameter(torch.randn(2, 32, 13))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).reshape(1, 2, 2, -1, 32)  # heads, blocks
        return (y.reshape(1, 2, -1, 32) @ self.keys).reshape(1, 2, 2, -1, 13)


class Clamps(nn.Module):
    """Several of one tensor, and such that contradict each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        both = y.clamp(max=0.1).clamp(min=0.2), y.clamp(min=0.2).clamp(max=0.1)
        return *both, y.clamp(min=0.5, max=-0.5), y.clamp(max=-0.1).relu(), y.relu().clamp(max=-0.1)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("model", [Rows, Heads, Clamps])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_file_has_the_numbers_of_the_program(model: type[nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(48 if model is Heads else 4, 32).to(dtype)
    program = qcompile.quantize(model().eval().to(dtype), (x,), calibration=[(x,)], progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    results = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = program.module()(x)
    for got, want in zip(results, [expected] if isinstance(expected, Tensor) else expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-2, atol=1e-2)
