"""modelopt's FP8 file of ViT-base, which ONNX Runtime does not load, repaired: it runs, and keeps its engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxruntime")

import qcompile
from tests.qcompile.onnx.modelopt_files import export_for_tensorrt, export_plainly, quantized_vit
from tests.qcompile.onnx.test_repair_modelopt import known_shapes, relative


@pytest.mark.slow
def test_vit_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized_vit(layers=12, hidden=768, heads=12, image=224)
    export_for_tensorrt(model, x, tmp_path / "old.onnx", monkeypatch)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    onnx.checker.check_model(str(tmp_path / "new.onnx"), full_check=True)
    assert report.standardized == {"trt::QuantizeLinear": 135, "trt::DequantizeLinear": 208}
    assert known_shapes(tmp_path / "new.onnx") == (367, 367)
    session = qcompile.onnx_session(tmp_path / "new.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy().astype(np.float16)})
    with torch.no_grad():
        # random weights: 1e-4 at the input moves it by 0.1, and modelopt's file has a quantized softmax and half scales
        assert relative(logits, model(x).logits.numpy()) < 0.3
    expect = {"attention_fp8": 12, "gemm_fp8": 49}
    engine = qcompile.build_engine(tmp_path / "new.onnx", target="sm89", expect=expect, progress=False)
    before = qcompile.build_engine(tmp_path / "old.onnx", target="sm89", progress=False)
    assert (engine.kernels, engine.attention.fp8) == (before.kernels - 1, 12)  # of the weight of the patch embedding


@pytest.mark.slow
def test_vit_base_with_float_weights(tmp_path: Path) -> None:
    model, x = quantized_vit(layers=12, hidden=768, heads=12, image=224)
    export_plainly(model, x, tmp_path / "old.onnx", 17)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert len(report.folded) == 73 and report.bytes[1] < report.bytes[0] / 3.5
    (logits,) = qcompile.onnx_session(tmp_path / "new.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        assert relative(logits, model(x).logits.numpy()) < 0.2  # see above; two layers agree to 1e-5
    engine = qcompile.build_engine(tmp_path / "new.onnx", target="sm89", expect={"gemm_fp8": 49}, progress=False)
    assert engine.attention.fp8 == 0  # nothing quantizes the softmax in such a file, and the repair adds no quantizer
