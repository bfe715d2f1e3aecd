"""The recipe fp8_block on a whole model: program, both files, both forms, and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile

transformers = pytest.importorskip(
    "transformers", reason="the models are Hugging Face's: pip install 'qcompile[transformers]'"
)

IDS = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(0))
# sides that are multiples of 128, and such that are not: heads of 48 begin in the middle of a block
SIZES = {
    "whole": {"hidden_size": 256, "intermediate_size": 512},
    "ragged": {"hidden_size": 192, "intermediate_size": 440},
}
SLOW = pytest.mark.slow


def llama(sizes: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES[sizes], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def program_of(sizes: str, dtype: torch.dtype = torch.float16) -> torch.export.ExportedProgram:
    return qcompile.quantize(llama(sizes), (), {"input_ids": IDS}, recipe="fp8_block", dtype=dtype, progress=False)


def logits(program: torch.export.ExportedProgram) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(program.module()(input_ids=IDS).logits.double().numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "target", "dtype"),
    [
        pytest.param("whole", "tensorrt", torch.float16, marks=SLOW),
        pytest.param("whole", "portable", torch.float16, marks=SLOW),
        ("ragged", "tensorrt", torch.float16),
        pytest.param("ragged", "portable", torch.float16, marks=SLOW),
        pytest.param("ragged", "tensorrt", torch.float32, marks=SLOW),
    ],
)
def test_every_layer_of_the_file_is_that_of_the_program(
    sizes: str, target: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    program = program_of(sizes, dtype)
    batch = {"input_ids": IDS}
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target, compare=batch)
    assert report.coverage == {"linear": (14, 15), "attention": (0, 2)}
    assert {fmt for path, fmt in report.quantized.items() if path.endswith("_proj")} == {"fp8_128x128"}
    assert report.comparison is not None
    for difference in report.comparison.differences:
        assert difference.relative_l2 <= (2e-2 if "quantize" in difference.name else 2e-3), difference
    assert {d.module for d in report.comparison.differences if "matmul" in d.name} >= {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    (got, *_) = session.run(None, {"input_ids": IDS.numpy()})
    want = logits(program)
    # a code that flips in one layer is another input to the next; FP8 itself moves these logits by 0.08
    bar = 0.05 if dtype == torch.float16 else 0.01
    assert np.linalg.norm(got - want) <= bar * np.linalg.norm(want)


@SLOW
def test_per_channel_on_request_is_as_far_from_the_model(tmp_path: Path) -> None:
    program = program_of("whole")
    with torch.no_grad():
        want = llama("whole").double()(input_ids=IDS).logits.numpy()
    blocks = np.linalg.norm(logits(program) - want) / np.linalg.norm(want)
    qcompile.export_onnx(program, tmp_path / "m.onnx", block_fp8="per_channel")
    (got, *_) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"input_ids": IDS.numpy()})
    channels = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert blocks <= 0.1 and channels <= 1.5 * blocks


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm89", pytest.param("sm120", marks=SLOW)])
def test_every_linear_layer_is_fp8_in_the_engine(target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")
    engine = qcompile.build_engine(program_of("ragged"), target=target, progress=False)
    assert engine.gemms["fp8"] == 8
    names = [
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")
    ]
    assert engine.precisions == {**dict.fromkeys(names, "fp8"), "lm_head": "half"}
    assert {gap.module for gap in engine.not_low_precision if gap.kind == "gemm"} == {"lm_head"}
