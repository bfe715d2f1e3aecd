"""Every script in examples/ runs, says what it promises, and is short and listed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
# script -> packages that it wants, and a line that it prints
EXAMPLES = {
    "quantize_to_onnx": (["onnxruntime"], "quantized: {'linear': (8, 8), 'attention': (2, 2)}"),
    "build_an_engine": (["tensorrt_rtx"], "FP8 attentions: 2 of 2; {'fp8': 8,"),
    "torch_compile": ([], "linear, quantized    2 of 2"),
    "generate": (["transformers", "onnxruntime"], "bytes of cache for each token: 128"),
    "checkpoint": (["transformers"], "quantized: 14 layers; left as they are: model.embed_tokens lm_head"),
    "from_modelopt": (["modelopt"], "quantized: {'0': 'fp8', '2': 'fp8'}\nchecks passed: True"),
    "own_recipe": ([], "not: layers.0.self_attn layers.1.self_attn layers.2.self_attn.in_proj"),
    "own_data": (["onnxruntime"], "logits of a batch of one: (1, 8)"),
    "calibration_data": (["transformers"], "21 batches of (2, 64), the first from texts.jsonl, lines 1 to 2"),
    "repair": (["onnxruntime"], "new.onnx: ['onnx::Add', 'onnx::DequantizeLinear'"),
    "own_pass": (["tensorrt_rtx"], "own passes: 1; GEMMs in FP8: 2;"),
    "read_a_report": (["onnxruntime"], "unquantized: {'memory': 'recurrent'}"),
}
# a C++ compiler, the import of modelopt, and what tests of the same route run every day
SLOW = ("torch_compile", "generate", "from_modelopt", "own_data", "checkpoint", "build_an_engine", "calibration_data")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXAMPLES]
)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages, expected = EXAMPLES[name]
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_each_is_short_listed_and_tested() -> None:
    scripts = sorted(FOLDER.glob("*.py"))
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        lines = script.read_text(encoding="utf-8").splitlines()
        assert len(lines) < (60 if script.stem == "own_pass" else 40) and lines[0].startswith('"""'), script.name
        assert f"[{script.name}]({script.name})" in listed
    assert {script.stem for script in scripts} >= EXAMPLES.keys()
