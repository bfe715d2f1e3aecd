"""`qcompile export --cache` and `qcompile generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile.cli import main
from qcompile.cli.alone import with_values


def test_an_option_may_stand_alone() -> None:
    dynamic = ["--cache", "dynamic"]
    assert with_values(["export", "m", "--cache", "-o", "out"]) == ["export", "m", *dynamic, "-o", "out"]
    assert with_values(["export", "m", "--cache"]) == ["export", "m", *dynamic]
    assert with_values(["export", "m", "--cache", "static"]) == ["export", "m", "--cache", "static"]
    assert with_values(["build", "--cache"]) == ["build", "--cache"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache-length", "9"), "--cache-length: for a decoder with a cache: give --cache, too"),
        (("--logits", "last"), "--logits: for a decoder with a cache"),
        (("--cache", "static"), "--cache static has a length: give --cache-length"),
        (("--cache", "--cache-length", "9"), "--cache-length is for --cache static"),
        (("--cache", "--dynamic-batch"), "--dynamic-batch: not with --cache"),
        (("--recipe", "none", "--set", "power_of_two=true"), "--set is for a recipe, and --recipe none is none"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "m.onnx"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m.onnx").exists()


def test_text_goes_to_stdout_and_its_speed_to_stderr(
    made: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(made(None)[0])
    expected = qcompile.Generator(folder).generate("Hi", max_new_tokens=8)
    assert main(["generate", folder, "--prompt", "Hi", "--max-new-tokens", "8", "--no-stream"]) == 0
    whole = capsys.readouterr()
    assert main(["generate", folder, "--prompt", "Hi", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == whole.out
    assert "prompt: 2 tokens, " in whole.err and "new: 8 tokens, " in whole.err
    ids = ",".join(map(str, qcompile.Generator(folder).tokenizer("Hi")["input_ids"]))
    assert main(["generate", folder, "--tokens", ids, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{','.join(map(str, expected.tokens[0]))}\n"
    for arguments, message in {
        (): "say what to go on from",
        ("--tokens", "1,x"): "'x' is no token",
        ("--prompt", "x" * 100): "more than the 96 positions",
        ("--tokenizer", str(tmp_path), "--prompt", "x"): "has no tokenizer",
    }.items():
        assert main(["generate", folder, *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_directory_is_exported_compared_and_generates(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    out, report = tmp_path / "out", tmp_path / "report.json"
    data = ("--calibration", str(tmp_path / "texts.txt"), "--sequence", "32", "--samples", "4")
    command = ("export", str(llama), "-o", str(out), "--recipe", "fp8+fp8_kv", "--cache", *data)
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert main([*command, "--report", str(report)]) == 0
    assert "Token by token" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["steps"]["depends"] and len(written["steps"]["steps"]) == 99
    assert {Path(name).name for name in written["new"]} == {path.name for path in out.iterdir()}
    assert main(["inspect", str(report)]) == 0
    assert main(["generate", str(out), "--prompt", "The quick", "--max-new-tokens", "4"]) == 0
    assert main([*command[:3], str(tmp_path / "m.onnx"), "--recipe", "none", "--cache", "--logits", "last"]) == 0
    assert (tmp_path / "m.onnx").is_file() and {p.name for p in tmp_path.iterdir()} >= {"m.onnx", "out"}
