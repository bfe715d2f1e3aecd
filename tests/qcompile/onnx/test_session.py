"""Sessions open FP8 files, external data included, and run them as onnx.reference does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from qcompile.errors import QCompileError
from qcompile.onnx.session import onnx_session


@pytest.mark.parametrize("external", [False, True])
def test_fp8_file_runs(model: Any, feeds: Any, tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    expected = ReferenceEvaluator(model.proto).run(None, feeds)[0]
    onnx.save(model.proto, path, save_as_external_data=external, location="m.data", size_threshold=0)
    session = onnx_session(path)
    assert session.get_providers() == ["CPUExecutionProvider"]
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_option_is_needed(model: Any, tmp_path: Path) -> None:
    """If ONNX Runtime learns to load this file by itself, the option can go."""
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        onnxruntime.InferenceSession(model.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    onnx_session(model.proto.SerializeToString())


def test_the_callers_options_are_kept(model: Any, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnx_session(model.proto.SerializeToString(), sess_options=options)
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QCompileError, match=r"no ONNX file at .*absent\.onnx"):
        onnx_session(tmp_path / "absent.onnx")


def test_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QCompileError, match=r"qcompile\[onnxruntime\]"):
        onnx_session(tmp_path / "m.onnx")
