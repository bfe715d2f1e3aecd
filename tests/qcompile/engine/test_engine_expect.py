"""Expectations, and what happens to the engine file when something fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.engine import build_engine
from qcompile.errors import EngineError, ExpectationError

pytest.importorskip("tensorrt_rtx")


def build(path: Path, output: Path | None = None, **options: Any) -> Any:
    return build_engine(path, output, target="sm89", progress=False, **options)


def test_met(block_file: Callable[..., Path]) -> None:
    report = build(block_file("fp8"))
    exact = {"attention": 1, "attention_fp8": 1, "gemm_fp8": report.gemms["fp8"], "kernels": report.kernels}
    report.check(exact)
    report.check({"attention_fp8": 0, "gemm_fp8": 1, "gemm_int8": 0, "gemm_fp4": 0, "kernels": 999})
    for key in exact:
        worse = exact[key] + (-1 if key == "kernels" else 1)
        with pytest.raises(ExpectationError, match=f"{key}: at (least|most) {worse} wanted, {exact[key]} found"):
            report.check({key: worse})


def test_shortfall_names_modules_and_writes_nothing(block_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "model.engine"
    output.write_bytes(b"old")
    with pytest.raises(ExpectationError) as caught:
        build(block_file(None), output, expect={"attention_fp8": 1, "gemm_fp8": 4, "attention": 1, "kernels": 99})
    message = str(caught.value)
    assert "attention_fp8: at least 1 wanted, 0 found" in message
    assert "attention layers.0.attn: fused in half: not quantized in the file" in message
    assert "gemm layers.0.fc2: ran in half" in message
    assert "attention: at least" not in message
    assert "kernels" not in message
    assert output.read_bytes() == b"old"


@pytest.mark.parametrize("expect", [{"fp8_attention": 1}, {"kernels": -1}, {"kernels": True}, {"kernels": "9"}])
def test_bad_expectations_are_refused_before_the_build(tmp_path: Path, expect: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="expect: "):
        build(tmp_path / "missing.onnx", expect=expect)


def test_the_engine_is_written_whole(linear_file: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.engine"
    output.parent.mkdir()
    report = build(linear_file(), output)
    assert output.stat().st_size == report.bytes
    assert os.listdir(output.parent) == ["model.engine"]


def test_a_full_disk_leaves_the_old_file(
    linear_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "model.engine"
    output.parent.mkdir()
    output.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"cannot write .*engine: no room is left on the disk"):
        build(linear_file(), output)
    assert output.read_bytes() == b"old"
    assert os.listdir(output.parent) == ["model.engine"]


def test_an_unwritable_place_is_refused_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        build(tmp_path / "missing.onnx", tmp_path / "nowhere" / "model.engine")
    with pytest.raises(EngineError, match="is a directory"):
        build(tmp_path / "missing.onnx", tmp_path)
