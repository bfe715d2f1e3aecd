"""The models of the coverage table: all of their attentions and linear layers are quantized, and the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the models are Hugging Face's: pip install 'qcompile[transformers]'")

import qcompile
from benchmarks.coverage import measure
from benchmarks.zoo import ZOO, Model

# what each of these needed is in the names of its passes
FIRED = {"gemma3": "FoldMasks", "deepseek-v3-dense": "ScattersToConcat", "swin": "FoldMasks"}
BY_NAME = {model.name: model for model in ZOO}


def export(model: Model, path: Path, **options: Any) -> qcompile.Report:
    example = model.example(dynamic=False)
    return qcompile.export_onnx(example.quantized(dtype=model.dtype), path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRED)
def test_every_attention_is_quantized(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name]
    report = export(model, tmp_path / "model.onnx")
    assert report.fired["FuseAttentionQdq"] == model.attentions
    assert report.fired[FIRED[name]] >= 1
    assert set(report.unquantized) <= {"lm_head"}
    assert all(check.passed for check in report.checks)


@pytest.mark.slow
def test_heads_of_two_widths_fuse_in_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = BY_NAME["deepseek-v3-dense"]
    report = export(model, tmp_path / "model.onnx")
    assert report.fired["PadHeadWidths"] == 2
    engine = qcompile.build_engine(
        tmp_path / "model.onnx", target="sm120", expect={"attention_fp8": 2, "gemm_fp8": 14}, progress=False
    )
    assert engine.attention.total == 2


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", ZOO, ids=[model.name for model in ZOO])
def test_what_is_not_low_precision_has_a_reason(model: Model, dynamic: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    if dynamic not in model.forms:
        pytest.skip("the model does not support this form")
    row = measure(model, "fp8", dynamic=dynamic)
    assert (row.failures, row.unexplained) == ([], {})
    attentions = [what for what in row.reasons if what.startswith("attention")]
    assert row.attention_fp8 + len(attentions) == row.attention_total == model.attentions
