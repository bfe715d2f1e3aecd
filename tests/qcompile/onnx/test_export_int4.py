"""INT4 weights in files: the layout that ONNX Runtime and TensorRT-RTX multiply by as it is stored; both are judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from packaging.version import Version
from torch import Tensor, nn

import qcompile
from qcompile.errors import ExportError

X = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1))


def recipe(group: int = 128) -> dict[str, Any]:
    rule = {"quantizer": "*.weight_quantizer", "format": "int4", "group_size": group}
    return {"metadata": {"name": "mine", "description": "a test"}, "rules": [rule]}


class Mlp(nn.Module):
    """Biased and not, a Relu between two products, and one weight with two readers."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.up, self.same = nn.Linear(256, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.down = nn.Linear(hidden, 34)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.same(self.same(torch.relu(self.up(x))).tanh()))


def program_of(model: nn.Module, group: int = 128, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    return qcompile.quantize(model.eval(), (X,), recipe=recipe(group), dtype=dtype, progress=False)


def session(path: Path, saved: Path, level: int | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(saved), 3
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(of: ort.InferenceSession, x: Tensor = X) -> np.ndarray:
    return np.asarray(of.run(None, {of.get_inputs()[0].name: x.numpy()})[0])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    ("group", "target"),
    [(32, "portable"), pytest.param(64, "portable", marks=pytest.mark.slow), (128, "tensorrt")],
)
def test_onnx_runtime_multiplies_by_the_codes_as_they_are(group: int, target: Any, tmp_path: Path) -> None:
    """MatMulNBits for each product, in which accuracy level 1 is exact, and its default rounds the activations."""
    torch.manual_seed(0)
    model = Mlp()
    program = program_of(model, group)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target, compare=(X,))
    assert set(report.quantized.values()) == {f"int4_{group}_weight_only"}
    assert report.comparison is not None and max(d.relative_l2 for d in report.comparison.differences) < 1e-6
    assert any("qdq_matmulnbits_accuracy_level" in notice for notice in report.notices)
    file = onnx.load(tmp_path / "m.onnx")
    codes = [t for t in file.graph.initializer if t.data_type == TensorProto.INT4]
    assert len(codes) == 4 and [n.op_type for n in file.graph.node].count("MatMul") == 4  # a copy for each reader
    with torch.no_grad():
        expected = program.module()(X).numpy()
    exact, rounded = (run(session(tmp_path / "m.onnx", tmp_path / "opt.onnx", level)) for level in (1, None))
    operators = [node.op_type for node in onnx.load(tmp_path / "opt.onnx").graph.node]
    left = operators.count("DequantizeLinear")  # of one product in releases such as 1.24
    assert left <= (0 if Version(ort.__version__) >= Version("1.31") else 1)
    assert operators.count("MatMulNBits") == 4 - left
    assert distance(exact, expected) < 1e-6 and 1e-4 < distance(rounded, expected) < 5e-2
    for options in (None, ort.SessionOptions()):
        assert distance(run(qcompile.onnx_session(tmp_path / "m.onnx", sess_options=options)), expected) < 1e-6


def test_codes_and_scales_are_those_of_a_plain_rounding(tmp_path: Path) -> None:
    """amax / 7 of each group, in the dtype of the graph; with `max`, of a layer with one group to a row, too."""
    layer = nn.Sequential(nn.Linear(128, 6, bias=False))
    chosen = {**recipe(), "calibration": {"algorithm": "max"}}
    program = qcompile.quantize(layer, (X[..., :128],), recipe=chosen, dtype=torch.float16, progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    stored = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    weight = layer[0].weight.detach().numpy().T
    scale = (np.abs(weight).max(0) / np.float32(7)).astype(np.float16)
    found = numpy_helper.to_array(stored["0.weight"])
    assert found.dtype == ml_dtypes.int4 and found.shape == (128, 6)
    np.testing.assert_array_equal(found.astype(int), np.clip(np.rint(weight / scale.astype(np.float32)), -8, 7))
    # one group is written as two halves: with one scale to a column TensorRT dequantizes in a kernel of its own
    scales = next(t for t in stored.values() if t.data_type == TensorProto.FLOAT16)
    np.testing.assert_array_equal(numpy_helper.to_array(scales), np.stack([scale, scale]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_compares_by_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = qcompile.export_onnx(program_of(Mlp(), dtype=dtype), tmp_path / "m.onnx", compare=(X,))
    assert report.comparison is not None
    bar = 1e-3 if dtype is torch.float16 else 8e-3
    assert max(d.relative_l2 for d in report.comparison.differences) < bar


def test_the_opset_needs_int4(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 20 has no INT4; leave `opset` out, or give 21"):
        qcompile.export_onnx(program_of(Mlp()), tmp_path / "m.onnx", opset=20)


def test_what_stays_or_costs_is_said(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.odd = nn.Embedding(33, 128), nn.Linear(128, 33)
            self.odd.weight = self.embed_tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.odd(self.embed_tokens(ids))

    program = qcompile.quantize(Tied(), (torch.arange(4)[None],), recipe=recipe(), dtype=torch.float32, progress=False)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert report.quantized == {"odd": "int4_128_weight_only"} and report.unquantized == {"odd": "embedding"}
    assert report.reasons["odd"] == "rows are looked up and not multiplied"
    assert any("1 weight with an odd number of outputs, which TensorRT" in notice for notice in report.notices)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensorrt_has_one_kernel_for_each_product(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for group in (32, 64, 128):
        qcompile.export_onnx(program_of(Mlp(), group, dtype), tmp_path / "m.onnx")
        built = qcompile.build_engine(tmp_path / "m.onnx", target=target, expect={"gemm_int4": 4}, progress=False)
        assert built.gemms["int4"] == 4 and not built.not_low_precision
