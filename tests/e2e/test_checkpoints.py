"""A checkpoint written, read back, exported and built is the same as straight from the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="checkpoints are Hugging Face's: pip install 'qcompile[transformers]'")
pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

import qcompile
from benchmarks.zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "format"),
    [
        ("llama", "fp8", "modelopt"),
        pytest.param("llama", "fp8", "compressed-tensors", marks=pytest.mark.slow),
        pytest.param("llama", "nvfp4_fp8_attention", "modelopt", marks=pytest.mark.slow),
        pytest.param("qwen3", "fp8_gemm", "modelopt", marks=pytest.mark.slow),
        pytest.param("llama", "fp8_block", "fp8", marks=pytest.mark.slow),
        pytest.param("qwen3", "fp8_block", "compressed-tensors", marks=pytest.mark.slow),
        pytest.param("qwen3", "fp8_per_channel_per_token", "compressed-tensors", marks=pytest.mark.slow),
        pytest.param("qwen3", "nvfp4_weight_only", "modelopt", marks=pytest.mark.slow),
        pytest.param("llama", "nvfp4", "compressed-tensors", marks=pytest.mark.slow),
        ("qwen3-moe", "fp8_qkvo-nvfp4_mlp", "modelopt"),
        pytest.param("qwen3-moe", "fp8_qkvo-nvfp4_mlp", "compressed-tensors", marks=pytest.mark.slow),
    ],
)
def test_same_codes_and_same_kernels(name: str, recipe: str, format: str, tmp_path: Path) -> None:
    model = next(model for model in ZOO if model.name == name)
    example = model.example(dynamic=False)
    straight = example.quantized(recipe=recipe, dtype=model.dtype)
    report = qcompile.save_checkpoint(
        straight, tmp_path / "checkpoint", format=format, source=example.model, progress=False
    )
    loaded = qcompile.load_checkpoint(tmp_path / "checkpoint")
    again = qcompile.import_quantized(
        loaded, example.args, example.kwargs, calibration=example.calibration, dtype=model.dtype, progress=False
    )

    _assert_same_codes(straight.state_dict, again.state_dict)
    files = [tmp_path / "straight.onnx", tmp_path / "again.onnx"]
    reports = [qcompile.export_onnx(program, file) for program, file in zip((straight, again), files, strict=True)]
    assert reports[0].quantized == reports[1].quantized
    projections = {m for m in reports[0].quantized if m.endswith("_proj") and "experts" not in m}
    assert projections and set(report.quantized) >= projections
    target = "sm120" if "nvfp4" in recipe else "sm89"
    engines = [qcompile.build_engine(file, target=target, progress=False) for file in files]
    assert engines[0].attention == engines[1].attention
    assert engines[0].gemms == engines[1].gemms
    assert _precisions(engines[0]) == _precisions(engines[1])
    assert engines[0].kernels == engines[1].kernels


def _assert_same_codes(straight: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> None:
    """Every tensor of codes or of scales, bit by bit."""
    expected, found = ({_name(k): v.detach() for k, v in state.items()} for state in (straight, again))
    assert found.keys() == expected.keys()
    compared = 0
    for name, tensor in expected.items():
        assert tensor.shape == found[name].shape, name
        if name.endswith("_q_scale"):  # no checkpoint says it; calibrated again, on a model whose layers are quantized
            torch.testing.assert_close(found[name], tensor, rtol=0.2, atol=0)
            continue
        if name.endswith("global_scale"):  # compressed-tensors stores 1 / g, whose inverse can be one digit beside g
            torch.testing.assert_close(found[name], tensor, rtol=2**-23, atol=0)
        elif tensor.dtype in (torch.float8_e4m3fn, torch.uint8) or name.endswith("scale"):
            left, right = (t.reshape(-1).contiguous().view(torch.uint8) for t in (tensor, found[name]))
            assert torch.equal(left, right), name
            compared += 1
    assert compared >= 14


def _precisions(engine: qcompile.EngineReport) -> dict[str, str]:
    """Module path -> type, with the two products of a mixture of experts under one name."""
    return {re.sub(r"(\.experts)\..*", r"\1", module): kind for module, kind in engine.precisions.items()}


def _name(name: str) -> str:
    """Fused experts are parameters of the model, and layers of a checkpoint that was read."""
    return name.removesuffix(".weight").replace(".", "_")
