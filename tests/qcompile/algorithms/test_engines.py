"""Scales that an algorithm chose fuse as those of `max` do: the real builder runs the same kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qcompile
from tests.passes.support import Attention, Mlp

pytest.importorskip("tensorrt_rtx")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(heads=2, width=32), Mlp(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.self_attn(x).transpose(1, 2).flatten(2))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("algorithm", ["mse", "gptq"])
@pytest.mark.parametrize(("recipe", "target"), [("nvfp4_fp8_attention", "sm120"), ("fp8", "sm89"), ("int8", "sm89")])
def test_an_engine_runs_the_kernels_of_max(recipe: str, target: str, algorithm: str, tmp_path: Path) -> None:
    x = torch.randn(2, 64, 64)
    engines = []
    for name in ("max", algorithm):
        chosen = qcompile.load_recipe(recipe, [f"calibration={{algorithm: {name}}}"])
        program = qcompile.quantize(Block(), (x,), recipe=chosen, calibration=[x], progress=False)
        path = tmp_path / f"{name}.onnx"
        assert all(check.passed for check in qcompile.export_onnx(program, path).checks)
        engines.append(qcompile.build_engine(path, target=target, progress=False))
    of_max, ours = engines
    assert (ours.kernels, ours.gemms, ours.attention) == (of_max.kernels, of_max.gemms, of_max.attention)
    assert sum(count for precision, count in ours.gemms.items() if precision in ("fp4", "fp8", "int8")) == 3
