"""`qcompile repair`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from qcompile.cli import main
from tests.qcompile.onnx.legacy import linear


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    onnx.save(linear(opset=17), "old.onnx")
    return "old.onnx"


def test_repair(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", old, "new.onnx", "--report", "repair.json"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "opset 19 (was",
        "opset 17)",
        "trt::TRT_FP8QuantizeLinear, now standard",
        "weight [24, 40] float32",
    ):
        assert expected in said
    data = json.loads(Path("repair.json").read_text())
    assert data["source"] == old and data["repair"]["kind"] == "repair" and data["repair"]["shapes"] == 3
    assert main(["inspect", "repair.json"]) == 0
    assert "weight [24, 40] float32" in capsys.readouterr().out
    onnx.checker.check_model("new.onnx", full_check=True)
    assert main(["repair", "new.onnx", "again.onnx"]) == 0
    assert "standard already" in capsys.readouterr().out
    assert main(["inspect", "again.onnx"]) == 0


def test_errors_are_one_message(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", old, old]) == 2
    assert "is part of the old file, which is never changed" in capsys.readouterr().err
    assert main(["repair", "missing.onnx", "new.onnx"]) == 2
    assert "error: no ONNX file at 'missing.onnx'" in capsys.readouterr().err
    assert main(["repair", old, "nowhere/new.onnx"]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert {file.name for file in Path().iterdir()} == {"old.onnx"}


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("qcompile repair vit.fp8.onnx vit.onnx", "UINT8 and UINT4 become INT8 and INT4", "--report"):
        assert expected in said
