"""`qcompile checkpoint`: what it writes and shows, and which options it refuses; and how it was spelled before."""

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
    return main(["checkpoint", "llama", *argv])


def test_block_fp8_is_the_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", "out", "--report", "report.json", "--dry-run") == 0
    foreseen = capsys.readouterr().out
    assert "format fp8, recipe fp8_block" in foreseen and {path.name for path in here.iterdir()} == {"llama"}
    assert run("-o", "out", "--report", "report.json") == 0
    shown = capsys.readouterr()
    assert shown.out[shown.out.index("Layers") : shown.out.index("notice")] in foreseen
    assert "format fp8, recipe fp8_block" in shown.out and "fp8_128x128 weight" in shown.out
    assert "pytorch_model.bin" in shown.out  # that it was left out
    report = json.loads((here / "report.json").read_text())
    assert report["checkpoint"]["format"] == "fp8" and len(report["checkpoint"]["quantized"]) == 7
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in read(here / "out")
    assert main(["inspect", "report.json"]) == 0
    assert "fp8_128x128 weight" in capsys.readouterr().out
    assert run("-o", "out") == 2
    assert "out is not empty" in capsys.readouterr().err


def test_static_recipes_are_calibrated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ("-o", "out", "--format", "modelopt", "--recipe", "fp8")
    assert run(*request) == 2
    assert "qcompile checkpoint llama " + " ".join((*request, "--calibration", "random")) in capsys.readouterr().err
    save_file({"input_ids": torch.randint(0, 96, (2, 40))}, here / "ids.safetensors")
    assert run("-o", "out", "--recipe", "fp8", "--calibration", "ids.safetensors") == 2
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
        ((), "say what to write: --output DIR"),
        (("-o", "out", "--opset", "21"), "Unknown option: --opset"),
        (("-o", "out", "--format", "modelopt"), "say which with --recipe"),
        (("-o", "out", "--format", "gguf"), "gguf"),
        (("-o", "nowhere/out"), "there is no directory"),
        (("-o", "out", "--samples", "3"), "--samples is for calibration data"),
        (("-o", "out", "--batch", "0"), "--batch 0: a size is 1 or more"),
    ],
)
def test_what_it_refuses(here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    assert run(*argv) == 2
    said = capsys.readouterr().err.replace("\n", " ").replace('"', "")  # around options in older releases of cyclopts
    assert message in said
    assert {path.name for path in here.iterdir()} == {"llama"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "say what to write: --output FILE; `qcompile checkpoint` writes a Hugging Face directory"),
        (("-o", "x.onnx", "--format", "fp8"), "--format is for a checkpoint, which `qcompile checkpoint` writes"),
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
def test_what_does_not_go_together_in_the_old_spelling(
    here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert main(["export", "llama", *argv]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert {path.name for path in here.iterdir()} == {"llama"}


@pytest.mark.parametrize("target", [("--to-checkpoint", "out"), ("--to-checkpoint=out",)])
def test_the_old_spelling_works_and_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...]
) -> None:
    assert main(["export", "llama", "--format", "fp8", *target, "--dry-run"]) == 0
    shown = capsys.readouterr()
    new = " ".join(target).replace("--to-checkpoint", "--output")
    assert f"it is: qcompile checkpoint llama --format fp8 {new} --dry-run" in shown.err
    assert "format fp8, recipe fp8_block" in shown.out


def test_a_source_that_is_no_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "models:make", "-o", "out"]) == 2
    assert "a checkpoint is made from a Hugging Face directory, and models:make is none" in capsys.readouterr().err


def test_two_commands_teach_each_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    main(["checkpoint", "--help"])
    shown = capsys.readouterr().out
    assert "-o ./llama-fp8" in shown and "compressed-tensors" in shown and "--opset" not in shown
    main(["export", "--help"])
    shown = capsys.readouterr().out
    assert "--to-checkpoint" not in shown and "--format" not in shown and "qcompile checkpoint" in shown
