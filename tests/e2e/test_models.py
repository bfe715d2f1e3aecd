"""Whole models, each of which once went wrong between capture and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile

DYNAMIC = torch.export.Dim.DYNAMIC
FLOAT32 = {"dtype": torch.float32, "dynamic_shapes": ({0: DYNAMIC, 1: DYNAMIC},)}
FLOAT16 = {"dtype": torch.float16}


class Masked(nn.Module):
    """Two attentions with a float mask that is reshaped on its way; some queries see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = (layer(x).view(2, 40, 4, 16).transpose(1, 2) for layer in self.layers[:3])
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
            x = x + self.layers[3](attended.transpose(1, 2).reshape(2, 40, 64))
        return x


class Tied(nn.Module):
    """The weight of the last layer is the embedding's, which stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle, self.out = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 96, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.middle(self.tokens(ids)))


def mask_with_hidden_rows() -> Tensor:
    mask = torch.zeros(2, 40, 40)
    mask[1, :, 30:] = torch.finfo(torch.float32).min
    mask[1, 35:] = torch.finfo(torch.float32).min
    return mask


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


def outputs(model: nn.Module, args: tuple[Any, ...], path: Path, **options: Any) -> tuple[np.ndarray, ...]:
    """What the model, its quantized program and its file in ONNX Runtime make of `args`."""
    model.eval()
    program = qcompile.quantize(model, args, calibration=[args], progress=False, **options)
    qcompile.export_onnx(program, path)
    session = qcompile.onnx_session(path)
    feeds = {node.name: arg.numpy() for node, arg in zip(session.get_inputs(), args, strict=True)}
    with torch.no_grad():
        return model(*args).numpy(), program.module()(*args).numpy(), session.run(None, feeds)[0]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("make", "args", "options", "tolerance"),
    [
        (
            encoder,
            (torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)),),  # one code beside costs 6e-4
            {"dtype": torch.float32, "dynamic_shapes": ({0: DYNAMIC, 1: DYNAMIC},)},
            1e-5,
        ),
        (Masked, (torch.randn(2, 40, 64), mask_with_hidden_rows()), FLOAT16, 0.04),
        (Tied, (torch.randint(0, 96, (2, 32)),), FLOAT16, 0.01),
    ],
    ids=["encoder", "masked", "tied"],
)
def test_model_program_and_file_agree(
    make: Any, args: tuple[Any, ...], options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, program, file = outputs(make(), args, tmp_path / "model.onnx", **options)
    assert distance(program, model) < 0.1
    assert distance(file, program) < tolerance


@pytest.mark.slow
def test_a_learned_attention_bias_in_bfloat16(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=100)
    args = (torch.randint(0, 100, (2, 40)),)
    model = transformers.T5EncoderModel(config).bfloat16()
    program = qcompile.quantize(model, args, recipe="fp8_gemm", calibration=[args], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "model.onnx")
    assert all(check.passed for check in report.checks) and len(report.quantized) >= 12


def test_a_quantized_program_is_not_quantized_again() -> None:
    x = torch.randn(4, 64)
    program = qcompile.quantize(nn.Linear(64, 64), (x,), calibration=[x], progress=False)
    with pytest.raises(qcompile.QCompileError, match="already"):
        qcompile.quantize(program, calibration=[x])
