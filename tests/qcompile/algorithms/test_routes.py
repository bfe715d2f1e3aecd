"""Algorithms through every door: the same codes in the program, the checkpoints, the ONNX file, the compiled model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qcompile
from tests.qcompile.checkpoint.models import read, save, tiny

X = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(48, 32), nn.Linear(48, 32), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def mse(name: str) -> qcompile.Recipe:
    return qcompile.load_recipe(name, ["calibration={algorithm: mse, candidates: 12}"])


def largest(name: str) -> qcompile.Recipe:
    return qcompile.load_recipe(name, ["calibration={algorithm: max}"])


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", ["int8", "fp8_gemm", "nvfp4"])
def test_the_compiled_model_and_the_file_have_the_codes_of_the_program(name: str, tmp_path: Path) -> None:
    model, recipe = Net().eval(), mse(name)
    state = qcompile.calibrate(model, (X,), recipe=recipe, calibration=[X], progress=False)
    program = qcompile.quantize(model, (X,), recipe=recipe, calibration=state, dtype=torch.float32)
    plain = qcompile.quantize(model, (X,), recipe=largest(name), calibration=[X], dtype=torch.float32, progress=False)
    assert any(not torch.equal(t.float(), plain.state_dict[n].float()) for n, t in program.state_dict.items())
    torch._dynamo.reset()
    options = {"recipe": recipe, "calibration": state, "target": "eager"}
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="qcompile", options=options)(X), program.module()(X))
    torch._dynamo.reset()
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    if name != "nvfp4":
        (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
        np.testing.assert_allclose(found, program.module()(X).detach().numpy(), rtol=0.02, atol=0.02)


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("nvfp4_weight_only", "modelopt"),
        ("fp8_per_channel_per_token", "compressed-tensors"),
        pytest.param("fp8_block", "fp8", marks=pytest.mark.slow),
        pytest.param("int8_per_channel_per_token", "compressed-tensors", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_directory_and_program_give_the_same_checkpoint(tmp_path: Path, family: str, name: str, format: str) -> None:
    model, recipe = tiny(family), mse(name)
    source = save(model, tmp_path / "source", "60KB")
    inputs = {"input_ids": torch.arange(8)[None]}
    program = qcompile.quantize(model, kwargs=inputs, recipe=recipe, dtype=torch.float32)
    options = {"format": format, "progress": False}
    qcompile.save_checkpoint(source, tmp_path / "streamed", recipe=recipe, **options)  # type: ignore[arg-type]
    qcompile.save_checkpoint(source, tmp_path / "plain", recipe=largest(name), **options)  # type: ignore[arg-type]
    qcompile.save_checkpoint(program, tmp_path / "quantized", source=source, **options)  # type: ignore[arg-type]
    streamed, quantized, plain = (read(tmp_path / n) for n in ("streamed", "quantized", "plain"))
    assert streamed.keys() == quantized.keys()
    as_bytes = {n: (a, quantized[n]) for n, a in streamed.items()}
    assert not [
        n for n, (a, b) in as_bytes.items() if not torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))
    ]
    codes = [n for n, t in streamed.items() if t.dtype.itemsize == 1]
    assert any(not torch.equal(streamed[n].view(torch.uint8), plain[n].view(torch.uint8)) for n in codes)


DATA = {
    "hessian_mse": "{algorithm: hessian_mse}",
    "gptq": "{algorithm: gptq}",
    "gptq in order": "{algorithm: mse}, {algorithm: gptq, scales: mse, sequential: true}",
}
"""Algorithms that see data: steps of a recipe. One more is a row more."""


def bytes_of(tensors: Iterable[Tensor]) -> set[bytes]:
    return {t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors}


def codes_of(program: Any) -> dict[str, Tensor]:
    """The codes of weights, and of the scales of their blocks."""
    return {name: t for name, t in program.state_dict.items() if t.ndim and t.dtype.itemsize == 1}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("steps", DATA)
@pytest.mark.parametrize("name", ["nvfp4", "fp8_gemm", "int8"])
def test_codes_that_data_chose_are_in_files_and_run(steps: str, name: str, tmp_path: Path) -> None:
    model, recipe = Net().eval(), qcompile.load_recipe(name, [f"calibration=[{DATA[steps]}]"])
    program = qcompile.quantize(model, (X,), recipe=recipe, calibration=[X], dtype=torch.float32, progress=False)
    plain = qcompile.quantize(model, (X,), recipe=largest(name), calibration=[X], dtype=torch.float32, progress=False)
    codes = codes_of(program)
    assert codes.keys() == codes_of(plain).keys() and bytes_of(codes.values()) != bytes_of(codes_of(plain).values())
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert bytes_of(codes_of(loaded).values()) == bytes_of(codes.values())
    for target in ("portable", "tensorrt"):
        checks = qcompile.export_onnx(program, tmp_path / f"{target}.onnx", target=target).checks
        assert all(check.passed for check in checks)
        held = onnx.load(tmp_path / f"{target}.onnx").graph.initializer
        stored = bytes_of(code for name, code in codes.items() if "scale" not in name)
        turned = bytes_of(code.T for name, code in codes.items() if "scale" not in name)
        found = {raw_of(tensor) for tensor in held}
        assert stored <= found or turned <= found
    if name != "nvfp4":
        (got,) = qcompile.onnx_session(tmp_path / "portable.onnx").run(None, {"x": X.numpy()})
        np.testing.assert_allclose(got, program.module()(X).detach().numpy(), rtol=0.02, atol=0.02)
    torch._dynamo.reset()
    module = program.module()
    with torch.no_grad():
        compiled = torch.compile(module, backend="qcompile", options={"target": "eager"})(X)
    torch._dynamo.reset()
    assert torch.equal(compiled, module(X))


def raw_of(tensor: onnx.TensorProto) -> bytes:
    raw = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.FLOAT4E2M1:
        numbers = raw.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(-1, 2)
        return bytes((numbers[:, 0] | numbers[:, 1] << 4).tobytes())
    return bytes(np.ascontiguousarray(raw).tobytes())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("steps", ["gptq", "hessian_mse"])
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("nvfp4", "compressed-tensors"),
        ("nvfp4_weight_only", "modelopt"),
        ("fp8_per_channel_per_token", "compressed-tensors"),
        ("fp8_block", "fp8"),
    ],
)
def test_codes_that_data_chose_are_in_checkpoints(steps: str, name: str, format: str, tmp_path: Path) -> None:
    model, recipe = tiny("llama"), qcompile.load_recipe(name, [f"calibration=[{DATA[steps]}]"])
    source, inputs = save(model, tmp_path / "source"), {"input_ids": torch.arange(48)[None]}
    program = qcompile.quantize(
        model, kwargs=inputs, recipe=recipe, calibration=[inputs], dtype=torch.float32, progress=False
    )
    options: dict[str, Any] = {"format": format, "progress": False}
    qcompile.save_checkpoint(program, tmp_path / "out", source=source, **options)
    assert bytes_of(codes_of(program).values()) <= bytes_of(read(tmp_path / "out").values())
