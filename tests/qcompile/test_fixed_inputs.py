"""Learned queries, tables of positions and other operands that no user input reaches: nothing is asked of the user."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.report.record import record_of


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (p(t).unflatten(-1, (2, 32)).transpose(1, 2) for p, t in ((self.q, x), (self.k, y), (self.v, y)))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Learned(nn.Module):
    """32 learned vectors, normalized: queries of the data (DETR), of themselves first, or a memory for it to read."""

    def __init__(self, *, memory: bool = False, among_themselves: bool = False, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.memory, self.vectors, self.norm, self.attn = (
            memory,
            nn.Parameter(torch.randn(1, 32, 64)),
            nn.LayerNorm(64),
            Attention(),
        )
        self.own = Attention() if among_themselves else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.vectors.expand(x.shape[0], -1, -1) if self.late else self.vectors
        vectors = self.norm(rows).expand(x.shape[0], -1, -1)
        if self.own is not None:
            vectors = vectors + self.own(vectors, vectors)
        out: Tensor = self.attn(x, vectors) if self.memory else self.attn(vectors, x)
        return out


class Positions(nn.Module):
    """An MLP on a table (Swin v2), and a layer that reads zeros as often as there are rows (a start token)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(64, 32))
        self.mlp = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64))
        self.proj, self.start = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(x + self.mlp(self.grid)), self.start(torch.zeros_like(x[:, :1]))


class Classes(nn.Module):
    """A zero-shot head: a projection of every row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.text, self.image = nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x) @ self.text(self.table(torch.arange(16))).T


MODELS = {
    "queries": (Learned, {}, {"attn.q"}),
    "queries of each row": (Learned, {"late": True}, {"attn.q"}),
    "queries among themselves": (
        Learned,
        {"among_themselves": True},
        {"own", "own.q", "own.k", "own.v", "own.o", "attn.q"},
    ),
    "memory": (Learned, {"memory": True}, {"attn.k", "attn.v"}),
    "positions": (Positions, {}, {"mlp.0", "mlp.2", "start"}),
    "classes": (Classes, {}, {"text"}),
}
RECIPES = ("fp8", "int8", "fp8_per_channel_per_token", "nvfp4_fp8_attention", "nvfp4_weight_only")
EVERYDAY = {("queries", "fp8", False), ("memory", "fp8", True), ("positions", "int8", True)}
CASES = [
    pytest.param(name, recipe, dynamic, marks=[] if (name, recipe, dynamic) in EVERYDAY else pytest.mark.slow)
    for name in MODELS
    for recipe in RECIPES
    for dynamic in (False, True)
]
X = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))


def made(name: str) -> tuple[nn.Module, set[str]]:
    torch.manual_seed(0)
    kind, options, fixed = MODELS[name]
    return kind(**options).eval(), fixed


def quantized(name: str, recipe: str, dynamic: bool, **options: Any) -> tuple[Any, set[str]]:
    model, fixed = made(name)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    return (
        qcompile.quantize(
            model, (X,), recipe=recipe, calibration=[X], dynamic_shapes=shapes, progress=False, **options
        ),
        fixed,
    )


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("name", "recipe", "dynamic"), CASES)
def test_listed_exported_and_equal(name: str, recipe: str, dynamic: bool, tmp_path: Path) -> None:
    program, fixed = quantized(name, recipe, dynamic, dtype=torch.float32)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    declined = {d.module for d in report.declined if d.reason == "not quantized: no user input reaches it"}
    assert declined == {path for path in fixed if path != "own" or "attention" in recipe or recipe == "fp8"}
    assert declined <= set(report.unquantized) and report.quantized
    assert not declined & set(report.quantized)
    if recipe.startswith("nvfp4"):
        return  # ONNX Runtime has no FP4
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    for x in [X, torch.cat([X, -X])] if dynamic else [X]:
        expected = program.module()(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, want in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4_fp8_attention"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_they_build_and_attention_fuses(name: str, dynamic: bool, recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    program, _ = quantized(name, recipe, dynamic)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="tensorrt")
    profiles = {"profiles": {"x": ((1, 64, 64), (2, 64, 64), (8, 64, 64))}} if dynamic else {}
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm120", **profiles)  # type: ignore[arg-type]
    assert engine.attention.fp8 == report.coverage.get("attention", (0, 0))[0]
    assert name in ("positions", "classes") or not engine.gemms["half"], "what is learned is stored"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_calibrated_state_and_torch_compile(name: str) -> None:
    model, fixed = made(name)
    state = qcompile.calibrate(model, (X,), calibration=[X], progress=False)
    assert not any(key.startswith(tuple(f"{path}.input" for path in fixed)) for key in state)
    program = qcompile.quantize(model, (X,), calibration=state, dtype=torch.float32, progress=False)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="qcompile", options={"calibration": state, "recipe": "fp8", "target": "eager"}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), program.module()(X))
    declined = {d.module for graph in qcompile.explain(compiled).graphs for d in graph.declined}
    assert fixed <= declined


def test_a_layer_is_listed_once_for_each_call_and_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    program, _ = quantized("positions", "fp8", False)
    assert [d.module for d in record_of(program).declined] == ["mlp.0", "mlp.2", "start"]
    assert not [r for r in caplog.records if r.name == "qcompile" and r.levelno >= logging.WARNING]
