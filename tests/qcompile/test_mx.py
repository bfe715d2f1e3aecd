"""MXFP8 and MXFP4: in checkpoints and under torch.compile; compressed-tensors and transformers are judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import qcompile
from passes.ir import dynamic_quantize
from qcompile.checkpoint.load import load_checkpoint
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.engine.capability import lacking
from qcompile.errors import ExportError
from tests.qcompile.checkpoint.models import batch, save, tiny

FORMATS = ["mxfp8", "mxfp4"]


def recipe(name: str, glob: str = "*.weight_quantizer") -> dict[str, Any]:
    rules = [{"quantizer": glob, "format": name}, {"quantizer": "{*lm_head*,*embed_tokens*}", "enable": False}]
    return {"metadata": {"name": "mine", "description": "a test"}, "rules": rules}


@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_the_least_powers_that_saturate_nothing(name: str) -> None:
    kind, most = (ml_dtypes.float8_e4m3fn, 448.0) if name == "mxfp8" else (ml_dtypes.float4_e2m1fn, 6.0)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[0, :32], x[1, 32:] = 0, torch.linspace(-most * 4, most * 4, 32)
    codes, scale = dynamic_quantize(x, None, format=name)
    blocks = x.numpy().reshape(6, 2, 32)
    amax = np.abs(blocks).max(-1)
    expected = np.where(amax > 0, 2.0 ** np.ceil(np.log2(np.where(amax > 0, amax / np.float32(most), 1))), 1)
    np.testing.assert_array_equal(scale.numpy(), expected)
    values = (blocks / scale.numpy()[..., None]).astype(kind).view(np.uint8).reshape(6, 64)
    if name == "mxfp4":
        values = values[:, ::2] | values[:, 1::2] << 4
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy() & 0x77, values & 0x77)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_transformers_has_the_weights_that_come_back(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = save(tiny("llama", torch.bfloat16, num_hidden_layers=1), tmp_path / "source")
    save_checkpoint(source, tmp_path / "out", format="compressed-tensors", recipe=recipe(name), progress=False)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=config, dtype=torch.bfloat16
    )
    back = load_checkpoint(tmp_path / "out")
    ids = batch()
    for path, layer in theirs.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(back.get_submodule(path).weight, layer.weight), path
    torch.testing.assert_close(back(**ids).logits, theirs(**ids).logits)


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_torch_compile_runs_them_and_files_do_not(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)).eval(), torch.randn(3, 64)
    both = recipe(name, "*.{weight,input}_quantizer")
    program = qcompile.quantize(model, (x,), recipe=both, dtype=torch.float32, progress=False)
    with torch.no_grad():
        run = torch.compile(model, backend="qcompile", options={"recipe": both, "target": target})
        torch.testing.assert_close(run(x), program.module()(x))
        assert 0 < float((run(x) - model(x)).norm() / model(x).norm()) < (0.1 if name == "mxfp8" else 0.4)
    torch._dynamo.reset()
    with pytest.raises(ExportError, match=f"weights in {name}, for which neither TensorRT-RTX nor ONNX Runtime has"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert "TensorRT is not known to have arithmetic" in str(lacking(name, 120))
