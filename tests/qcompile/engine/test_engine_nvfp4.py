"""NVFP4 programs in engines of the real builder: what multiplies in FP4, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.errors import EngineError
from tests.qcompile.onnx.nvfp4 import Mlp, quantized

pytest.importorskip("tensorrt_rtx")

X = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))


def exported(folder: Path, target: Any = "tensorrt", x: torch.Tensor = X, **options: bool) -> Path:
    torch.manual_seed(0)
    path = folder / f"{target}.onnx"
    qcompile.export_onnx(quantized(Mlp(), x, dtype=torch.float16, **options), path, target=target)
    return path


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {precision: count for precision, count in counts.items() if count}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("shape", [(128, 64), (2, 64, 64), (5, 64)], ids=str)
def test_every_linear_layer_is_an_fp4_gemm(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = exported(tmp_path, x=torch.randn(shape))
    report = qcompile.build_engine(path, target="sm120", expect={"gemm_fp4": 2}, progress=False)
    assert nonzero(report.gemms) == {"fp4": 2}
    assert report.not_low_precision == []
    assert report.precisions == {"up": "fp4", "down": "fp4"}


def test_the_portable_form_is_one_too(tmp_path: Path) -> None:
    report = qcompile.build_engine(exported(tmp_path, "portable"), target="sm120", progress=False)
    assert nonzero(report.gemms) == {"fp4": 2}


def test_a_rotation_is_named_and_the_layers_behind_it_are_fp4(tmp_path: Path) -> None:
    report = qcompile.build_engine(exported(tmp_path, rotate=True), target="sm120", progress=False)
    assert nonzero(report.gemms) == {"fp4": 2, "half": 2}
    assert report.precisions == {"up": "fp4", "down": "fp4"}
    assert {(entry.kind, entry.module) for entry in report.not_low_precision} == {("gemm", "up"), ("gemm", "down")}
    for entry in report.not_low_precision:
        assert entry.reason == "ran in half: a Hadamard rotation, which is not quantized"


def test_weights_only_multiply_in_half_precision(tmp_path: Path) -> None:
    report = qcompile.build_engine(exported(tmp_path, weight_only=True), target="sm120", progress=False)
    assert nonzero(report.gemms) == {"half": 2}
    assert all("activation not quantized in the file" in entry.reason for entry in report.not_low_precision)
    assert len(report.not_low_precision) == 2


@pytest.mark.everyday(1)
@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"weight_only": True}], ids=str)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_a_gpu_without_fp4_is_refused_before_the_build(
    tmp_path: Path, target: Any, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path, target, **options)
    monkeypatch.setattr("qcompile.engine.build.build", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(EngineError) as caught:
        qcompile.build_engine(path, target="sm89", progress=False)
    text = str(caught.value)
    assert text.startswith(("up uses FP4", "down uses FP4"))
    assert "sm89 has no FP4 arithmetic: build for sm120 or sm121" in text
    assert "quantize with the recipe fp8 for this target" in text


def test_fp8_attention_beside_nvfp4_layers(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).reshape(2, 64, 2, 32).transpose(1, 2) for p in (self.q, self.k, self.v))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(a.transpose(1, 2).reshape(2, 64, 64))

    x = torch.randn(2, 64, 64)
    program = qcompile.quantize(Block().eval(), (x,), recipe="nvfp4_fp8_attention", calibration=[(x,)], progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    report = qcompile.build_engine(tmp_path / "m.onnx", target="sm120", progress=False)
    assert (nonzero(report.gemms), report.attention.fp8, report.attention.total) == ({"fp4": 2}, 1, 1)
    assert report.not_low_precision == []


def test_experts_multiply_in_fp4(tmp_path: Path) -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(3, 64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.qcompile.batched_linear(x, self.up)

    x = torch.randn(3, 128, 64)
    qcompile.export_onnx(quantized(Experts(), x, dtype=torch.float16), tmp_path / "m.onnx")
    report = qcompile.build_engine(tmp_path / "m.onnx", target="sm120", expect={"gemm_fp4": 1}, progress=False)
    assert report.not_low_precision == []
