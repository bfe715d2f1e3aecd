"""Sessions open FP8 files, external data included, and run them as onnx.reference does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
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


def linear(codes: type, *, bias: tuple[int, ...] | None, activations: bool = True) -> onnx.ModelProto:
    """x [2, 8, 64] -> a linear layer whose weight, and activations if asked for, are in Q/DQ -> y."""
    rng = np.random.default_rng(0)
    values = {
        "scale": np.array(2**-5, np.float32),
        "zero": np.zeros((), codes),
        "weight": (rng.standard_normal((64, 32)) * 40).astype(codes),
        "bias": rng.standard_normal(bias or (1,)).astype(np.float32),
    }
    quantizer = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"]),
    ]
    nodes = [
        *(quantizer if activations else []),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["matrix"]),
        helper.make_node("MatMul", ["values" if activations else "x", "matrix"], ["product" if bias else "y"]),
        *([helper.make_node("Add", ["product", "bias"], ["y"])] if bias else []),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 8, 64])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 8, 32])
    stored = [numpy_helper.from_array(value, name) for name, value in values.items() if bias or name != "bias"]
    graph = helper.make_graph(nodes, "linear", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


LAYERS = {
    "fp8": linear(ml_dtypes.float8_e4m3fn, bias=None),
    "fp8 with a bias": linear(ml_dtypes.float8_e4m3fn, bias=(1, 1, 32)),
    "int8": linear(np.int8, bias=None),
    "int8 with a bias": linear(np.int8, bias=(32,)),
    "int8 weights": linear(np.int8, bias=None, activations=False),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_highest_level_gives_right_numbers(layer: str) -> None:
    """Without the option no release from 1.22 to 1.32 opens all of these and rounds no more than the file says."""
    model = LAYERS[layer]
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 8, 64)).astype(np.float32)}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    (found,) = onnx_session(model.SerializeToString(), sess_options=options).run(None, feeds)
    np.testing.assert_allclose(found, ReferenceEvaluator(model).run(None, feeds)[0], rtol=1e-4, atol=1e-4)


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
