"""FP8 in blocks in engines of the real builder: FP8 GEMMs, each found under its module, in both forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.errors import EngineError
from tests.qcompile.onnx.test_export_blocks import WEIGHT_ONLY, Mlp, program_of

pytest.importorskip("tensorrt_rtx")

DYNAMIC = torch.export.Dim.DYNAMIC


def gemms(report: qcompile.EngineReport) -> dict[str, int]:
    return {precision: count for precision, count in report.gemms.items() if count}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("hidden", [384, 200])
def test_k_split_products_are_fp8_gemms(target: str, hidden: int) -> None:
    program = program_of(Mlp(256, hidden), torch.randn(2, 32, 256))
    report = qcompile.build_engine(program, target=target, expect={"gemm_fp8": 2}, progress=False)
    assert gemms(report) == {"fp8": 2}
    assert report.precisions == {"gate_proj+up_proj": "fp8", "down_proj": "fp8"}
    assert report.not_low_precision == []
    assert report.kernels <= 3 * 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dynamic_shapes_in_each_dtype(dtype: torch.dtype) -> None:
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    program = program_of(Mlp(256, 200), torch.randn(2, 32, 256), dtype=dtype, dynamic_shapes=shapes)
    profile = {"x": ((1, 1, 256), (2, 32, 256), (4, 64, 256))}
    report = qcompile.build_engine(program, target="sm89", profiles=profile, progress=False)
    assert (gemms(report), report.precisions) == ({"fp8": 2}, {"gate_proj+up_proj": "fp8", "down_proj": "fp8"})


@pytest.mark.slow
def test_many_blocks() -> None:
    program = program_of(torch.nn.Linear(4096, 128), torch.randn(1, 16, 4096))
    assert gemms(qcompile.build_engine(program, target="sm89", progress=False)) == {"fp8": 1}


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("fp8_block", {"block_fp8": "per_channel"}),
        ("fp8_per_channel_per_token", {}),
        pytest.param("int8_per_channel_per_token", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_per_channel_per_token_is_the_fused_form(recipe: str, options: dict[str, Any], target: str) -> None:
    """A quantizing kernel, a GEMM, and a kernel that multiplies by both scales, which is the next layer's."""
    program = program_of(Mlp(), torch.randn(2, 32, 256), recipe)
    report = qcompile.build_engine(program, target=target, progress=False, **options)
    precision = recipe.partition("_")[0]
    assert gemms(report) == {precision: 2}
    assert report.precisions == {"gate_proj+up_proj": precision, "down_proj": precision}
    assert report.not_low_precision == []
    assert report.kernels == 5


def test_the_portable_file_is_one_too(tmp_path: Path) -> None:
    program = program_of(Mlp(), torch.randn(2, 32, 256))
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    report = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    assert set(report.precisions.values()) == {"fp8"}


def test_weights_only_multiply_in_half_precision() -> None:
    report = qcompile.build_engine(
        program_of(Mlp(), torch.randn(2, 32, 256), WEIGHT_ONLY), target="sm89", progress=False
    )
    assert gemms(report) == {"half": 3}
    assert {gap.module for gap in report.not_low_precision} == {"gate_proj", "up_proj", "down_proj"}


def test_an_unknown_route_is_refused_before_anything_else() -> None:
    with pytest.raises(EngineError, match="unknown route 'x'"):
        qcompile.build_engine("m.onnx", route="x", block_fp8="per_channel")  # type: ignore[arg-type]
