"""Norms that are one kernel with what is behind them: an activation, or a quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")


@pytest.mark.parametrize(("groups", "channels", "size"), [(8, 64, 16), (32, 320, 16), (1, 48, 16)])
def test_a_group_norm_and_its_activation(groups: int, channels: int, size: int, tmp_path: Path) -> None:
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    norm = nn.GroupNorm(groups, channels)
    model = nn.Sequential(convolutions[0], norm, nn.SiLU(), convolutions[1]).eval().half()
    x = torch.randn(1, channels, size, size).half()
    qcompile.export_onnx(torch.export.export(model, (x,)), tmp_path / "m.onnx")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    kernels = [layer.name for layer in engine.layers if layer.is_kernel]
    # the layout of the input, a convolution, the norm, a convolution, the layout of the output
    assert len(kernels) == 5 and "MeanSubMulMeanAddSqrt" in kernels[2] and "Silu" in kernels[2], kernels


class OfImage(nn.Module):
    """Channels last, an RMS norm with a weight that is not 1, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(64), nn.Linear(64, 128, bias=False)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.norm(x.permute(0, 2, 3, 1)))
        return result


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_an_rms_norm_of_a_transposed_tensor_and_its_quantizer(target: str, tmp_path: Path) -> None:
    args = (torch.randn(1, 64, 8, 8),)
    program = qcompile.quantize(
        OfImage().half().eval(), (args[0].half(),), calibration=[args[0].half()], progress=False
    )
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target=target, progress=False)
    assert engine.gemms["fp8"] == 1
    assert len([layer for layer in engine.layers if layer.is_kernel]) == 2, [layer.name for layer in engine.layers]
