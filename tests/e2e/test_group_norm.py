"""Group norms between convolutions: one kernel with the activation and the quantizer behind them, where groups fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")


@pytest.mark.parametrize(("groups", "channels", "size"), [(8, 64, 16), (32, 320, 16), (1, 48, 16)])
def test_norm_and_activation_are_one_kernel(groups: int, channels: int, size: int, tmp_path: Path) -> None:
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    norm = nn.GroupNorm(groups, channels)
    model = nn.Sequential(convolutions[0], norm, nn.SiLU(), convolutions[1]).eval().half()
    x = torch.randn(1, channels, size, size).half()
    qcompile.export_onnx(torch.export.export(model, (x,)), tmp_path / "m.onnx")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    kernels = [layer.name for layer in engine.layers if layer.is_kernel]
    # the layout of the input, a convolution, the norm, a convolution, the layout of the output
    assert len(kernels) == 5 and "MeanSubMulMeanAddSqrt" in kernels[2] and "Silu" in kernels[2], kernels
