"""What each IR operator becomes in ONNX: forms, axes and zero points, with ONNX Runtime and ml_dtypes as judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qcompile
from qcompile.onnx.verify import verify_onnx

OPSETS = [19, 20, 21, 22, 23]


def exported(module: nn.Module, args: tuple[Tensor, ...], path: Path, opset: int) -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.export.export(module.eval(), args).run_decompositions({})
    qcompile.export_onnx(program, path, target="portable", opset=opset)
    return onnx.load(path)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class QuantizedLinear(nn.Module):
    """A linear layer with Q/DQ on both sides, the scale of the weight as given."""

    def __init__(self, weight_scale: Tensor, fmt: str) -> None:
        super().__init__()
        self.format = fmt
        weight = torch.randn(6, 8)
        self.register_buffer("codes", torch.ops.qcompile.quantize(weight, weight_scale, format=fmt))
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", torch.tensor(2.0**-5))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.qcompile.quantize(x, self.input_scale, format=self.format)
        x = torch.ops.qcompile.dequantize(codes, self.input_scale, format=self.format, dtype=x.dtype)
        w = torch.ops.qcompile.dequantize(self.codes, self.weight_scale, format=self.format, dtype=x.dtype)
        return torch.nn.functional.linear(x, w)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_scales_are_scalars_or_vectors_on_the_axis_of_the_channels(tmp_path: Path, fmt: str, per_channel: bool) -> None:
    scale = 2.0 ** -torch.arange(3.0, 9.0).reshape(6, 1) if per_channel else torch.tensor(2.0**-6)
    module, x = QuantizedLinear(scale, fmt), torch.randn(3, 8)
    model = exported(module, (x,), tmp_path / "m.onnx", 21)
    values, dtype = constants(model), {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}[fmt]
    (weight,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values)
    codes, scales, zeros = (values[name] for name in weight.input)
    assert codes.dtype == dtype and zeros.dtype == dtype and not zeros.astype(np.float32).any()
    # Stored [K, N], so that no Transpose is left: the channels are on axis 1.
    assert codes.shape == (8, 6) and np.array_equal(codes.view(np.uint8), module.codes.view(torch.uint8).numpy().T)
    if per_channel:
        assert np.array_equal(scales, scale.flatten().numpy()) and zeros.shape == scales.shape
        assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
    else:
        assert scales.shape == () and zeros.shape == ()
    assert {n.op_type for n in model.graph.node} == {"QuantizeLinear", "DequantizeLinear", "MatMul"}
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("opset", OPSETS)
def test_codes_of_quantize_equal_ml_dtypes_at_each_opset(tmp_path: Path, opset: int) -> None:
    class Codes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor(2.0**-4)
            codes = torch.ops.qcompile.quantize(x, scale, format="fp8")
            return torch.ops.qcompile.dequantize(codes, scale, format="fp8", dtype=x.dtype)

    # codes, halves between codes (ties to even), the smallest, those that saturate
    steps = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    steps = np.sort(steps[np.isfinite(steps)])
    x = np.concatenate([steps, (steps[1:] + steps[:-1]) / 2, [500, -1e4, 464, 448.1]]).astype(np.float32) / 16
    exported(Codes(), (torch.from_numpy(x),), tmp_path / "m.onnx", opset)
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x})
    expected = np.clip(x * 16, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 16
    assert np.array_equal(found, expected)
    assert all(check.passed for check in verify_onnx(tmp_path / "m.onnx"))


@pytest.mark.everyday(3)
@pytest.mark.parametrize("opset", [19, 23])
@pytest.mark.parametrize(("weighted", "eps"), [(True, 1e-5), (False, 1e-5), (True, None)])
def test_rms_norm(tmp_path: Path, opset: int, weighted: bool, eps: float | None) -> None:
    norm = nn.RMSNorm((4, 8), eps=eps, elementwise_affine=weighted)
    if weighted:
        norm.weight.data.normal_()
    x = torch.randn(3, 4, 8) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None]
    model = exported(norm, (x,), tmp_path / "m.onnx", opset)
    assert ("RMSNormalization" in {n.op_type for n in model.graph.node}) == (opset == 23 and weighted)
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {model.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(found, norm(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_rms_norm_in_float16_adds_up_in_float32(tmp_path: Path) -> None:
    norm, x = nn.RMSNorm(64, eps=1e-6).half(), (torch.randn(2, 64) * 1000).half()  # a square does not fit float16
    exported(norm, (x,), tmp_path / "m.onnx", 21)
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, norm(x).detach().numpy(), rtol=2e-3)


def test_a_scale_per_block_is_an_error(tmp_path: Path) -> None:
    module: Any = QuantizedLinear(torch.tensor(0.01), "fp8")
    module.weight_scale = torch.ones(2, 4) / 64
    with pytest.raises(qcompile.QCompileError, match="per block"):
        exported(module, (torch.randn(3, 8),), tmp_path / "m.onnx", 21)
    assert not list(tmp_path.iterdir())
