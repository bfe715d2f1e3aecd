"""Weights that are pieces of parameters or computed of some, quantized, exported, run by ONNX Runtime and built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import qcompile
from tests.qcompile.dynamo.support import compiled

pytest.importorskip("onnxruntime", reason="it runs the files: pip install 'qcompile[onnxruntime]'")
X, MEMORY = torch.randn(2, 32, 64), torch.randn(2, 48, 64)


class Cross(nn.Module):
    """Attention to other keys than queries: `in_proj_weight` in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        result: Tensor = self.attn(x, memory, memory, need_weights=False)[0]
        return result


class Packed(nn.Module):
    """One parameter for three layers, matrices of a batch, and a weight with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.bias = nn.Linear(64, 192), nn.Parameter(torch.randn(192))
        self.batch = nn.Parameter(torch.randn(2, 64, 64) / 8)
        self.pruned = nn.Linear(64, 64)
        prune.l1_unstructured(self.pruned, "weight", 0.5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        first, second, third = self.packed.weight.chunk(3)
        y = F.linear(x, first, self.bias[:64]).relu() + F.linear(memory[:, :32], second)
        y = y @ self.batch[0] + F.linear(y, self.batch[1]) + F.linear(x, third * 0.5)
        return self.pruned(y)  # type: ignore[no-any-return]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(64, 64))
        self.b = parametrizations.spectral_norm(nn.Linear(64, 64))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.a(memory[:, :32])  # type: ignore[no-any-return]


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 2, 128, batch_first=True), 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "cross": (Cross, {"linear": (3, 3), "attention": (1, 1)}),
    "packed": (Packed, {"linear": (6, 6)}),
    "normed": (Normed, {"linear": (2, 2)}),
    "decoder": (decoder, {"linear": (14, 14), "attention": (4, 4)}),
}


def error(found: Any, want: Any) -> float:
    found, want = torch.as_tensor(found), torch.as_tensor(want)
    return float((found - want).norm() / want.norm())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_everything_is_quantized_and_files_agree(name: str, tmp_path: Path) -> None:
    make, coverage = MODELS[name]
    model = make().eval()
    program = qcompile.quantize(model, (X, MEMORY), calibration=[(X, MEMORY)], progress=False)
    want = program.module()(X, MEMORY)
    assert error(want, model(X, MEMORY).detach()) < 0.1
    for target in ("portable", "tensorrt"):
        report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)  # type: ignore[arg-type]
        assert report.coverage == coverage and not report.unquantized and not report.declined
        session = qcompile.onnx_session(tmp_path / "m.onnx")
        inputs = {each.name: value.numpy() for each, value in zip(session.get_inputs(), (X, MEMORY), strict=True)}
        assert error(session.run(None, inputs)[0], want) < 0.04  # codes flip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_they_build(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    program = qcompile.quantize(MODELS[name][0]().eval(), (X, MEMORY), calibration=[(X, MEMORY)], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="tensorrt")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    assert engine.attention.fp8 == report.coverage.get("attention", (0, 0))[0]
    assert engine.gemms["fp8"] and not engine.gemms["half"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_ranges_serve_torch_compile_and_a_program_is_saved(name: str, tmp_path: Path) -> None:
    model = MODELS[name][0]().eval()
    state = qcompile.calibrate(model, (X, MEMORY), calibration=[(X, MEMORY)], progress=False)
    program = qcompile.quantize(model, (X, MEMORY), calibration=state, dtype=torch.float32, progress=False)
    with torch.no_grad():
        want = program.module()(X, MEMORY)
        run = compiled(model, "fp8", calibration=state, expect={"linear": MODELS[name][1]["linear"][0]})
        torch.testing.assert_close(run(X, MEMORY), want)
    torch.export.save(program, tmp_path / "m.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(X, MEMORY), want)


def test_pieces_keep_step_with_their_parameter() -> None:
    model = Cross().eval()
    run = compiled(model, "fp8_per_channel_per_token", expect={"linear": 3})
    with torch.no_grad():
        for _ in range(2):
            assert error(run(X, MEMORY), model(X, MEMORY)) < 0.1
            model.attn.in_proj_weight.neg_()
        model.attn.in_proj_weight = nn.Parameter(torch.randn(192, 64) / 8)
        assert error(run(X, MEMORY), model(X, MEMORY)) < 0.1
        assert len(qcompile.explain(run).graphs) == 1
