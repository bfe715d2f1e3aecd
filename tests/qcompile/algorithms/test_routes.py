"""`mse` through every door: the same codes in the program, the checkpoints, the ONNX file and the compiled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", ["int8", "fp8_gemm", "nvfp4"])
def test_the_compiled_model_and_the_file_have_the_codes_of_the_program(name: str, tmp_path: Path) -> None:
    model, recipe = Net().eval(), mse(name)
    state = qcompile.calibrate(model, (X,), recipe=recipe, calibration=[X], progress=False)
    program = qcompile.quantize(model, (X,), recipe=recipe, calibration=state, dtype=torch.float32)
    plain = qcompile.quantize(model, (X,), recipe=name, calibration=[X], dtype=torch.float32, progress=False)
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
    qcompile.save_checkpoint(source, tmp_path / "plain", recipe=name, **options)  # type: ignore[arg-type]
    qcompile.save_checkpoint(program, tmp_path / "quantized", source=source, **options)  # type: ignore[arg-type]
    streamed, quantized, plain = (read(tmp_path / n) for n in ("streamed", "quantized", "plain"))
    assert streamed.keys() == quantized.keys()
    as_bytes = {n: (a, quantized[n]) for n, a in streamed.items()}
    assert not [
        n for n, (a, b) in as_bytes.items() if not torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))
    ]
    codes = [n for n, t in streamed.items() if t.dtype.itemsize == 1]
    assert any(not torch.equal(streamed[n].view(torch.uint8), plain[n].view(torch.uint8)) for n in codes)
