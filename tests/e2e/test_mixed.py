"""The recipe fp8_qkvo-nvfp4_mlp: each GEMM of an engine in the type that the recipe names for its module."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the models are Hugging Face's: pip install 'qcompile[transformers]'")
pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

import qcompile
from benchmarks.zoo import ZOO

# module path -> type; the first that matches
TYPES = {"*.mlp.gate": "float", "lm_head": "half", "*.mlp.*": "fp4", "*.self_attn.*": "fp8"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.slow), pytest.param("gemma3", marks=pytest.mark.slow), "qwen3-moe"]
)
def test_projections_are_fp8_and_mlps_are_nvfp4(name: str, tmp_path: Path) -> None:
    model = next(model for model in ZOO if model.name == name)
    example = model.example(dynamic=False)
    program = example.quantized(recipe="fp8_qkvo-nvfp4_mlp", dtype=model.dtype)
    report = qcompile.export_onnx(program, tmp_path / "model.onnx")
    engine = qcompile.build_engine(tmp_path / "model.onnx", target="sm120", progress=False)
    assert (engine.attention.fp8, engine.attention.total) == (model.attentions, model.attentions)
    expected = {
        module: next(kind for glob, kind in TYPES.items() if fnmatchcase(module, glob)) for module in engine.precisions
    }
    assert engine.precisions == expected
    assert {"fp8", "fp4"} < set(expected.values())
    assert {path for path in report.unquantized if not path.endswith(("gate", "lm_head"))} == set()
