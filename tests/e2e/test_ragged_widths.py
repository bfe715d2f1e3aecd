"""Reduction axes that a block of NVFP4 does not divide: padded, in FP4, and the kernels of a width that it divides.
And those that are too short for a GEMM: not quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")


class Gated(nn.Module):
    """The gated MLP of a block; EVA02 has a norm in front of its last layer, whose width is 8/3 of the hidden one."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(256), nn.LayerNorm(width) if normed else nn.Identity()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(256, width),
            nn.Linear(256, width),
            nn.Linear(width, 256),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        result: Tensor = x + self.down_proj(self.inner(F.silu(self.gate_proj(h)) * self.up_proj(h)))
        return result


def kernels(width: int, normed: bool, dynamic: bool, path: Path) -> int:
    x = torch.randn(2, 64, 256)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    model = Gated(width, normed).eval()
    program = qcompile.quantize(
        model, (x,), recipe="nvfp4", calibration=[(x,)], dtype=torch.float16, dynamic_shapes=shapes, progress=False
    )
    report = qcompile.export_onnx(program, path)
    assert report.coverage["linear"] == (3, 3) and not report.declined
    profiles = {"x": ((1, 64, 256), (2, 64, 256), (4, 64, 256))} if dynamic else None
    engine = qcompile.build_engine(path, target="sm120", profiles=profiles, progress=False)
    assert engine.gemms["fp4"] == 2 and engine.gemms["half"] == 0  # gate and up are one
    return engine.kernels


@pytest.mark.everyday(2)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_padding_costs_a_kernel_at_most(normed: bool, dynamic: bool, tmp_path: Path) -> None:
    ragged, whole = (kernels(width, normed, dynamic, tmp_path / f"{width}.onnx") for width in (682, 688))
    assert ragged <= whole + normed


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("recipe", "features", "idle"), [("fp8", 4, True), ("int8", 4, True), ("fp8", 5, False)])
def test_a_product_over_a_few_features_stays_in_the_kernel_beside_it(
    recipe: str, features: int, idle: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(features, 256), nn.LayerNorm(256), nn.Linear(256, 256)).eval()
    x = torch.randn(1, 128, features)
    half = torch.export.export(model.half(), (x.half(),))
    plain = qcompile.build_engine(half, target="sm89", progress=False)
    assert plain.gemms["half"] == (1 if idle else 2)  # why it is not quantized
    program = qcompile.quantize(model.float(), (x,), recipe=recipe, calibration=[(x,)], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert report.unquantized == ({"0": "linear"} if idle else {})
    assert [d.module for d in report.declined if f"it has {features} input features" in d.reason] == ["0"] * idle
