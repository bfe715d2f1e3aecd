"""`qcompile export --to-checkpoint`: what it writes and shows, and which options it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcompile.cli import main
from tests.qcompile.checkpoint.models import read, save, tiny


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model in `llama`."""
    monkeypatch.chdir(tmp_path)
    save(tiny("llama", num_hidden_layers=1), tmp_path / "llama")
    return tmp_path


def run(*argv: str) -> int:
    return main(["export", "llama", *argv])


def test_block_fp8_is_the_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--to-checkpoint", "out", "--report", "report.json", "--dry-run") == 0
    foreseen = capsys.readouterr().out
    assert "format fp8, recipe fp8_block" in foreseen and {path.name for path in here.iterdir()} == {"llama"}
    assert run("--to-checkpoint", "out", "--report", "report.json") == 0
    shown = capsys.readouterr()
    assert shown.out[shown.out.index("Layers") : shown.out.index("notice")] in foreseen
    assert "format fp8, recipe fp8_block" in shown.out and "fp8_128x128 weight" in shown.out
    assert "pytorch_model.bin" in shown.out  # that it was left out
    report = json.loads((here / "report.json").read_text())
    assert report["checkpoint"]["format"] == "fp8" and len(report["checkpoint"]["quantized"]) == 7
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in read(here / "out")
    assert main(["inspect", "report.json"]) == 0
    assert "fp8_128x128 weight" in capsys.readouterr().out
    assert run("--to-checkpoint", "out") == 2
    assert "out is not empty" in capsys.readouterr().err


def test_static_recipes_are_calibrated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ("--to-checkpoint", "out", "--format", "modelopt", "--recipe", "fp8")
    assert run(*request) == 2
    assert "qcompile export llama " + " ".join((*request, "--calibration", "random")) in capsys.readouterr().err
    save_file({"input_ids": torch.randint(0, 96, (2, 40))}, here / "ids.safetensors")
    assert run("--to-checkpoint", "out", "--recipe", "fp8", "--calibration", "ids.safetensors") == 2
    shown = capsys.readouterr().err
    assert "format fp8 cannot hold" in shown and "loading" not in shown  # said before the model is loaded
    assert run(*request, "--calibration", "ids.safetensors") == 0
    assert "key/value cache in FP8" in capsys.readouterr().out
    tensors = read(here / "out")
    assert tensors["model.layers.0.self_attn.q_proj.input_scale"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.k_proj.k_scale"] > 0
    assert {path.name for path in here.iterdir()} == {"llama", "out", "ids.safetensors"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "say what to write: --output FILE for an ONNX file, --to-checkpoint DIR"),
        (("-o", "x.onnx", "--format", "fp8"), "--format is for a checkpoint"),
        (
            ("--to-checkpoint", "out", "--opset", "21", "--no-compare"),
            "--opset, --no-compare: not with --to-checkpoint",
        ),
        (("--to-checkpoint", "out", "--engine", "e"), "--engine: not with --to-checkpoint"),
        (("--to-checkpoint", "out", "-o", "x.onnx"), "--output: not with --to-checkpoint"),
        (("--to-checkpoint", "out", "--random-weights", "0"), "--random-weights: not with --to-checkpoint"),
        (("--to-checkpoint", "out", "--format", "modelopt"), "say which with --recipe"),
        (("--to-checkpoint", "out", "--format", "gguf"), "gguf"),
        (("--to-checkpoint", "nowhere/out"), "there is no directory"),
    ],
)
def test_what_does_not_go_together(
    here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert run(*argv) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert {path.name for path in here.iterdir()} == {"llama"}


def test_a_source_that_is_no_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "models:make", "--to-checkpoint", "out"]) == 2
    assert "a checkpoint is made from a Hugging Face directory, and models:make is none" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", "--help"])
    shown = capsys.readouterr().out
    assert "--to-checkpoint ./llama-fp8 --format fp8" in shown and "compressed-tensors" in shown
