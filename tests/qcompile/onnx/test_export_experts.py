"""Experts and mixed recipes: NVFP4 beside FP8 in one file, against the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from tests.qcompile.onnx.nvfp4 import by_program, reference

TARGETS = ("tensorrt", "portable")


def exported(model: nn.Module, x: Tensor, path: Path, target: Any, **options: Any) -> tuple[ExportedProgram, Any]:
    program = qcompile.quantize(model.eval(), (x,), calibration=[(x,)], dtype=torch.float32, progress=False, **options)
    return program, qcompile.export_onnx(program, path, target=target)


def distance(program: ExportedProgram, path: Path, x: Tensor) -> float:
    expected = by_program(program, x)
    return float(np.linalg.norm(reference(path, {"x": x.numpy()}) - expected) / np.linalg.norm(expected))


class Experts(nn.Module):
    """Three experts of two layers each, batched."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(3, 48, 32)), nn.Parameter(torch.randn(3, 48))
        self.down = nn.Parameter(torch.randn(3, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ops.qcompile.batched_linear(x, self.up, self.bias).relu()
        return torch.ops.qcompile.batched_linear(hidden, self.down)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("recipe", "rows"),  # 1: all experts read the same
    [("nvfp4", 1), ("nvfp4", 3), ("nvfp4_weight_only", 3), ("fp8", 1), ("fp8_per_channel_per_token", 3)],
)
def test_experts(tmp_path: Path, recipe: str, target: Any, rows: int) -> None:
    x = torch.randn(rows, 5, 32)
    dynamic = ({1: Dim("tokens", max=64)},)
    program, report = exported(Experts(), x, tmp_path / "m.onnx", target, recipe=recipe, dynamic_shapes=dynamic)
    assert set(report.quantized) == {"up", "down"} and report.unquantized == {}
    assert report.coverage == {"experts": (2, 2)}
    weights = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if len(t.dims) == 3 and t.dims[1] > 1]
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in weights}
    assert kinds == ({"FLOAT8E4M3FN", "FLOAT4E2M1"} if "nvfp4" in recipe else {"FLOAT8E4M3FN"})
    assert distance(program, tmp_path / "m.onnx", torch.randn(rows, 9, 32)) < 1e-3


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).reshape(*x.shape[:2], 2, 16).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mlp(x + a.transpose(1, 2).reshape(x.shape))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("recipe", ["nvfp4_fp8_attention", "fp8_qkvo-nvfp4_mlp"])
def test_nvfp4_beside_fp8(tmp_path: Path, recipe: str, target: Any, rotate: bool) -> None:
    x = torch.randn(2, 40, 32)
    chosen = qcompile.load_recipe(recipe, ["rules[format=nvfp4].rotate=true"] if rotate else [])
    program, report = exported(Block(), x, tmp_path / "m.onnx", target, recipe=chosen)
    projections = "fp8" if recipe.startswith("fp8") else "nvfp4"
    assert report.quantized == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), projections),
        # TensorRT fuses no attention of a float32 program that no quantizer reads
        **({"": "fp8"} if target == "portable" else {}),
        **dict.fromkeys(("mlp.0", "mlp.2"), "nvfp4"),
    }
    assert report.opset == 23 and all(check.passed for check in report.checks)
    # a probability within a rounding of a tie may take the other FP8 code
    assert distance(program, tmp_path / "m.onnx", x) < (0.02 if "" in report.quantized else 0.1)
