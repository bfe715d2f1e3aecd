"""NVFP4 files: both targets verify, and the ONNX reference computes what the program computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, checker, shape_inference
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.errors import ExportError
from qcompile.onnx import save as save_module
from tests.qcompile.onnx.nvfp4 import Mlp, by_program, quantized, reference

TARGETS = ("tensorrt", "portable")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, bool]] = {"w4a4": {}, "rotated": {"rotate": True}, "w4a16": {"weight_only": True}}


@pytest.fixture(scope="module", params=OPTIONS)
def program(request: pytest.FixtureRequest) -> ExportedProgram:
    torch.manual_seed(0)
    return quantized(Mlp(), X, dynamic_shapes=({0: Dim("rows", max=64)},), **OPTIONS[request.param])


@pytest.fixture(scope="module")
def w4a4() -> ExportedProgram:
    torch.manual_seed(0)
    return quantized(Mlp(), X)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_valid_and_computes_what_the_program_does(
    program: ExportedProgram, tmp_path: Path, target: Any
) -> None:
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    model = onnx.load(tmp_path / "m.onnx")
    checker.check_model(model, full_check=True)
    del model.graph.value_info[:]
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert (model.ir_version, report.opset) == (11, 23)
    assert {o.domain for o in model.opset_import} - {"trt"} == {""}
    assert all(check.passed for check in report.checks) and report.declined == []
    assert {node.domain for node in model.graph.node} <= ({""} if target == "portable" else {"", "trt"})
    for rows in (3, 7):
        x = torch.randn(rows, 64)
        x[0] = 0
        expected = by_program(program, x)
        found = reference(tmp_path / "m.onnx", {"x": x.numpy()})
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
        assert not np.allclose(found, reference(tmp_path / "m.onnx", {"x": -x.numpy()}), atol=1e-2)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("target", TARGETS)
def test_no_weight_is_left_in_floats(program: ExportedProgram, tmp_path: Path, target: Any) -> None:
    """A quantization operator is never evaluated early: of what has two axes only rotations are floats."""
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
    matrices = {t.name: (TensorProto.DataType.Name(t.data_type), list(t.dims)) for t in tensors if len(t.dims) > 1}
    rotations = {name: found for name, found in matrices.items() if name.startswith("hadamard_")}
    assert {name: found for name, found in matrices.items() if name not in rotations} == {
        "up.weight": ("FLOAT4E2M1", [128, 64]),
        "up.weight_block_scale": ("FLOAT8E4M3FN", [128, 4]),
        "down.weight": ("FLOAT4E2M1", [64, 128]),
        "down.weight_block_scale": ("FLOAT8E4M3FN", [64, 8]),
    }
    assert set(rotations) in (set(), {"hadamard_64", "hadamard_128"})


def test_operators(w4a4: ExportedProgram, tmp_path: Path) -> None:
    report = qcompile.export_onnx(w4a4, tmp_path / "m.onnx")
    assert (report.ops["trt::TRT_FP4DynamicQuantize"], report.ops["DequantizeLinear"]) == (2, 8)
    assert "QuantizeLinear" not in report.ops
    assert report.quantized == {"up": "nvfp4", "down": "nvfp4"}
    report = qcompile.export_onnx(w4a4, tmp_path / "m.onnx", target="portable")
    assert (report.ops["QuantizeLinear"], report.ops["DequantizeLinear"]) == (4, 8)


@pytest.mark.parametrize("opset", [19, 21, 22])
def test_an_opset_without_fp4_is_an_error(w4a4: ExportedProgram, tmp_path: Path, opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} has no FP4; leave `opset` out, or give 23"):
        qcompile.export_onnx(w4a4, tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(tmp_path: Path, target: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 64)
    program = quantized(Mlp(), x, dtype=dtype, dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    assert all(check.passed for check in report.checks)
    if dtype is torch.float16:
        x = torch.randn(3, 4, 64)
        found, expected = reference(tmp_path / "m.onnx", {"x": x.numpy()}), by_program(program, x)
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_program_that_was_saved_and_loaded(w4a4: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(w4a4, tmp_path / "m.pt2")
    qcompile.export_onnx(torch.export.load(tmp_path / "m.pt2"), tmp_path / "loaded.onnx")
    qcompile.export_onnx(w4a4, tmp_path / "m.onnx")
    assert (tmp_path / "loaded.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert w4a4.state_dict["up.weight"].dtype is torch.uint8  # the program keeps its bytes


def test_weights_beside_the_file(w4a4: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qcompile.export_onnx(w4a4, tmp_path / "m.onnx")
    expected = reference(tmp_path / "m.onnx", {"x": X.numpy()})
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", 0)
    qcompile.export_onnx(w4a4, tmp_path / "m.onnx")
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert data.stat().st_size > 64 * 128
    np.testing.assert_array_equal(reference(tmp_path / "m.onnx", {"x": X.numpy()}), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_layer_by_layer(w4a4: ExportedProgram, tmp_path: Path, target: Any) -> None:
    report = qcompile.export_onnx(w4a4, tmp_path / "m.onnx", target=target, compare=X)
    assert report.comparison is not None and len(report.comparison.differences) >= 2
    assert max(difference.badness for difference in report.comparison.differences) < 1e-5


def test_factors_of_a_rotation_are_shared_and_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(3)), nn.Linear(384, 16))
    x = torch.randn(2, 384)
    program = quantized(model, x, rotate=True)
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    factors = {t.name: list(t.dims) for t in graph.initializer if t.name.startswith("hadamard_")}
    assert factors == {"hadamard_384": [384, 384]}
    assert sum("hadamard_384" in node.input for node in graph.node) == 4
    found, expected = reference(tmp_path / "m.onnx", {"input": x.numpy()}), by_program(program, x)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("target", TARGETS)
def test_projections_under_one_global_scale(tmp_path: Path, target: Any) -> None:
    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(64, 32), nn.Linear(64, 16), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(proj(x).reshape(2, 5, -1, 16).transpose(1, 2) for proj in (self.q, self.k, self.v))

    x = torch.randn(2, 5, 64)
    program = quantized(Qkv(), x)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    assert report.ops["MatMul"] == (1 if target == "tensorrt" else 3)
    found = reference(tmp_path / "m.onnx", {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, program.module()(x)[0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path, target: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).relu()).relu())

    program = quantized(Tied(), X)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert sum(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in tensors) == 1
    found, expected = reference(tmp_path / "m.onnx", {"x": X.numpy()}), by_program(program, X)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
