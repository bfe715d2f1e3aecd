"""Factors cost no kernel: in the norm and the layer before, and as a multiplication in front of a quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.graph import aten
from passes.program import unlift
from passes.testing import count
from tests.passes.support import Attention

pytest.importorskip("tensorrt_rtx")


class PreNorm(nn.Module):
    """Norms that layers alone read, an attention, and a gated layer: every factor goes into what is before.

    `gate` has the name of a router, which the recipes leave in half precision: its weight has the factor, too.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.self_attn, self.second = nn.RMSNorm(64), Attention(heads=2, width=32), nn.LayerNorm(64)
        self.out, self.gate, self.up, self.down = (nn.Linear(64, 64) for _ in range(4))
        self.first.weight.data[3] = self.second.weight.data[5] = 30.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.self_attn(self.first(x)).transpose(1, 2).reshape(2, -1, 64))
        y = self.second(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return result


class PostNorm(nn.Module):
    """The skip branch reads the norm, too, and a GELU is in between: three multiplications, and one factor in v."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.self_attn, self.second = nn.LayerNorm(64), Attention(heads=2, width=32), nn.LayerNorm(64)
        self.out, self.fc1, self.fc2 = (nn.Linear(64, 64) for _ in range(3))
        self.first.weight.data[3] = self.second.weight.data[5] = 30.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x + self.out(self.self_attn(x).transpose(1, 2).reshape(2, -1, 64)))
        result: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        return result


@pytest.mark.parametrize(
    ("model", "recipe", "target"),
    [
        pytest.param(PreNorm, "int8", "sm89", marks=pytest.mark.slow),
        pytest.param(PostNorm, "int8", "sm89", marks=pytest.mark.everyday(1)),
        pytest.param(PostNorm, "fp8", "sm89", marks=pytest.mark.slow),
        pytest.param(PreNorm, "nvfp4_fp8_attention", "sm120", marks=pytest.mark.slow),
        pytest.param(PostNorm, "nvfp4_fp8_attention", "sm120", marks=pytest.mark.slow),
    ],
)
def test_an_engine_runs_the_kernels_of_max(model: type[nn.Module], recipe: str, target: str, tmp_path: Path) -> None:
    x, engines, products = torch.randn(2, 64, 64), [], []
    for algorithm in ("max", "smoothquant, alpha: 0.5"):
        chosen = qcompile.load_recipe(recipe, [f"calibration={{algorithm: {algorithm}}}"])
        program = qcompile.quantize(model().eval(), (x,), recipe=chosen, calibration=[x], progress=False)
        products.append(count(unlift(program), aten.mul.Tensor))
        path = tmp_path / f"{len(engines)}.onnx"
        assert all(check.passed for check in qcompile.export_onnx(program, path).checks)
        engines.append(qcompile.build_engine(path, target=target, progress=False))
    of_max, smoothed = engines
    assert products[1] - products[0] == (0 if model is PreNorm else 3)
    assert (smoothed.kernels, smoothed.gemms, smoothed.attention) == (of_max.kernels, of_max.gemms, of_max.attention)
