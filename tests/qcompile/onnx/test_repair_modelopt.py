"""FP8 files by nvidia-modelopt, repaired: they compute what its fake-quantized model does, and fuse as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import shape_inference

import qcompile
from qcompile.onnx.execute import run_onnx_intermediates
from tests.qcompile.onnx import legacy
from tests.qcompile.onnx.modelopt_files import export_for_tensorrt, export_plainly, quantized_vit

onnxruntime = pytest.importorskip("onnxruntime")


def known_shapes(path: Path) -> tuple[int, int]:
    """How many Q/DQ outputs have numbers for all dims when only the inputs are typed, and how many there are."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    names = [node.output[0] for node in model.graph.node if node.op_type in legacy.STANDARD_NAMES]
    full = [n for n in names if n in types and all(dim.HasField("dim_value") for dim in types[n].shape.dim)]
    return len(full), len(names)


def relative(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("opset", [14, 20])
def test_float_weights_behind_quantizers(opset: int, tmp_path: Path) -> None:
    model, x = quantized_vit()
    export_plainly(model, x, tmp_path / "old.onnx", opset)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    onnx.checker.check_model(str(tmp_path / "new.onnx"), full_check=True)
    assert report.opset == (opset, max(opset, 19))
    assert report.standardized == {"trt::TRT_FP8QuantizeLinear": 39, "trt::TRT_FP8DequantizeLinear": 39}
    assert (
        len(report.folded) == 13
        and len(report.floats) == 1
        and report.transposes == 12
        and report.bytes[1] < report.bytes[0] * 0.6
    )
    assert known_shapes(tmp_path / "new.onnx") == (63, 63)
    (logits,) = qcompile.onnx_session(tmp_path / "new.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = model(x).logits.numpy()
    assert relative(logits, expected) < 1e-5


def test_standard_names_in_the_trt_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized_vit()
    export_for_tensorrt(model, x, tmp_path / "old.onnx", monkeypatch)
    with pytest.raises(Exception, match="trt:"):
        onnxruntime.InferenceSession(tmp_path / "old.onnx")
    assert known_shapes(tmp_path / "old.onnx")[0] < 10
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    onnx.checker.check_model(str(tmp_path / "new.onnx"), full_check=True)
    assert report.standardized == {"trt::QuantizeLinear": 25, "trt::DequantizeLinear": 38} and report.kept == {}
    assert known_shapes(tmp_path / "new.onnx") == (67, 67)
    _compare_layer_by_layer(tmp_path, x.numpy().astype(np.float16))
    before = qcompile.build_engine(tmp_path / "old.onnx", target="sm89", progress=False)
    after = qcompile.build_engine(tmp_path / "new.onnx", target="sm89", expect={"attention_fp8": 2}, progress=False)
    # the weight of the patch embedding, 16 x 16, is not dequantized in each run any more
    assert len(report.floats) == 1 and after.kernels == before.kernels - 1 and after.gemms == before.gemms


def _compare_layer_by_layer(folder: Path, x: Any) -> None:
    """Each GEMM of the new file in ONNX Runtime against the old file in onnx.reference with the legacy operators'
    formulas, on the same inputs: a flipped code early on would be seen in every layer after it."""
    old, new = onnx.load(folder / "old.onnx"), folder / "new.onnx"
    name = old.graph.input[0].name
    gemms = [node for node in old.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    # the weight of the patch embedding, 16 x 16, is float: TensorRT has no FP8 kernel for it
    edges = [used for node in gemms for used in node.input[: 1 if node.op_type == "Conv" else 2]]
    quantizers = {node.output[0]: node for node in old.graph.node if node.op_type in legacy.STANDARD_NAMES}
    sources = {quantizers[quantizers[edge].input[0]].input[0] for edge in edges if _from_activation(quantizers, edge)}
    values = run_onnx_intermediates(new, {name: x}, [*edges, *sources]).values
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in old.graph.initializer}
    worst = 0.0
    for edge in edges:
        dq = quantizers[edge]
        codes = constants.get(dq.input[0])
        if codes is None:
            q = quantizers[dq.input[0]]
            codes = legacy.quantize(values[q.input[0]], constants[q.input[1]])
        expected = legacy.dequantize(codes, constants[dq.input[1]])
        worst = max(worst, relative(values[edge], expected))
    assert len(edges) == 35 and worst < 1e-3


def _from_activation(quantizers: dict[str, onnx.NodeProto], edge: str) -> bool:
    return quantizers[edge].input[0] in quantizers
