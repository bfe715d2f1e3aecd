"""The public surface: what `import qcompile` offers, and the function that joins the two back ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile import api
from qcompile.errors import EngineError, QCompileError


def test_names() -> None:
    assert all(hasattr(qcompile, name) for name in qcompile.__all__)
    assert {"quantize", "export_onnx", "build_engine", "onnx_session", "QCompileError"} <= set(qcompile.__all__)


def test_every_error_is_in_one_tree() -> None:
    from qcompile import errors

    assert all(issubclass(getattr(errors, name), QCompileError) for name in errors.__all__)


def test_another_route_is_an_error() -> None:
    with pytest.raises(EngineError, match="unknown route 'tvm'; known: onnx, torch_tensorrt"):
        qcompile.build_engine("m.onnx", route="tvm")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="starts from a program, not from an ONNX file"):
        qcompile.build_engine("m.onnx", route="torch_tensorrt")


def test_a_program_goes_through_a_file_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def build(path: Path, output: Any, **options: Any) -> str:
        seen.update(options, path=path, output=output, there=Path(path).is_file())
        return "report"

    monkeypatch.setattr(api, "build_engine_from_file", build)
    x = torch.randn(4, 16)
    program = qcompile.quantize(nn.Linear(16, 8), (x,), calibration=[x], progress=False)
    options: dict[str, Any] = {"target": "sm89", "profiles": None, "expect": {"gemm_fp8": 1}, "progress": False}
    assert qcompile.build_engine(program, "m.engine", **options) == "report"
    assert seen["there"] and not Path(seen["path"]).exists()
    assert seen["output"] == "m.engine" and {name: seen[name] for name in options} == options
    qcompile.build_engine("there.onnx", None, **options)
    assert seen["path"] == "there.onnx" and not seen["there"]


def test_a_program_becomes_a_real_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    x = torch.randn(4, 16)
    program = qcompile.quantize(nn.Linear(16, 16), (x,), calibration=[x], progress=False)
    report = qcompile.build_engine(
        program, tmp_path / "m.engine", target="sm89", expect={"gemm_fp8": 1}, progress=False
    )
    assert report.gemms["fp8"] == 1 and (tmp_path / "m.engine").stat().st_size == report.bytes
