"""Biases in INT32, as ONNX Runtime's quantizer writes them, become float: TensorRT builds, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

import qcompile
from qcompile.errors import EngineError
from tests.qcompile.onnxfile.test_refused import linear


def run(path: Path, x: Any) -> Any:
    """In a session without optimizations and without anything of qcompile's."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        self.left = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(3)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """Two Gemms with biases, quantized by `onnxruntime.quantization.quantize_static`, symmetric INT8."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in {"w0": (64, 128), "b0": (128,), "w1": (128, 64), "b1": (64,)}.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], name="second"),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "f.onnx")
    quantization.quantize_static(
        tmp_path / "f.onnx",
        tmp_path / "old.onnx",
        Batches(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return tmp_path / "old.onnx"


def int32_dequantizers(path: Path) -> int:
    model = onnx.load(path)
    codes = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT32}
    return sum(node.op_type == "DequantizeLinear" and node.input[0] in codes for node in model.graph.node)


def test_of_onnxruntimes_quantizer(quantized: Path, tmp_path: Path) -> None:
    assert int32_dequantizers(quantized) == 2
    report = qcompile.repair_onnx(quantized, tmp_path / "new.onnx")
    assert report.changed and len(report.biases) == 2 and not report.notices
    assert int32_dequantizers(tmp_path / "new.onnx") == 0
    onnx.checker.check_model(str(tmp_path / "new.onnx"), full_check=True)
    x = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(tmp_path / "new.onnx", x), run(quantized, x))


@pytest.mark.slow
def test_the_repaired_file_builds_with_int8_kernels(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="it is the judge")
    with pytest.raises(EngineError, match="qcompile repair folds"):
        qcompile.build_engine(quantized, target="sm89", progress=False)
    qcompile.repair_onnx(quantized, tmp_path / "new.onnx")
    for target in ("sm89", "sm120"):
        engine = qcompile.build_engine(tmp_path / "new.onnx", target=target, progress=False)
        assert engine.gemms["int8"] == 2


@pytest.mark.parametrize("form", ["Gemm", "Add"])
@given(codes=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=64, max_size=64), exponent=st.integers(-40, 4))
@settings(max_examples=10)
def test_any_codes_are_dequantized_as_onnxruntime_does(
    form: str, codes: list[int], exponent: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bias")
    source = linear(bias=form)
    replaced = {"b": np.array(codes, np.int32), "bs": np.linspace(1, 2, 64).astype(np.float32) * 2.0**exponent}
    for tensor in source.graph.initializer:
        if tensor.name in replaced:
            tensor.CopyFrom(
                numpy_helper.from_array(replaced[tensor.name].astype(replaced[tensor.name].dtype), tensor.name)
            )
    onnx.save(source, folder / "old.onnx")
    qcompile.repair_onnx(folder / "old.onnx", folder / "new.onnx")
    x = np.zeros((16, 64), np.float32)
    np.testing.assert_array_equal(run(folder / "new.onnx", x), run(folder / "old.onnx", x))


def test_one_that_is_an_output_stays(tmp_path: Path) -> None:
    source = linear(bias="Gemm")
    source.graph.output.append(helper.make_tensor_value_info("bd", TensorProto.FLOAT, [64]))
    onnx.save(source, tmp_path / "old.onnx")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert not report.biases and "INT32" in report.notices[0]
