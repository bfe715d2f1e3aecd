"""Programs whose sizes depend on data: nothing of an export stays in them, and files say the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import qcompile
from qcompile.errors import EngineError

Function = Callable[[nn.Module, Tensor], object]


class Picked(nn.Module):
    """A linear layer within `function`."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Linear(16, 16)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.proj, x)


def rows_of_a_mask(proj: nn.Module, x: Tensor) -> object:
    return proj(x[(x > 1.0).any(-1)])


def listed_places(proj: nn.Module, x: Tensor) -> object:
    places = (x[:, :, 0] > 0).nonzero()
    return proj(x[places[:, 0], places[:, 1]]), proj(x[places.unbind(-1)] * 2)


def selected(proj: nn.Module, x: Tensor) -> object:
    return torch.masked_select(proj(x), x > 0), torch.masked_select(proj(x), (x > 0).all(-1, keepdim=True))


def an_item(proj: nn.Module, x: Tensor) -> object:
    count = (x[0, :, 0] > 0).sum().item()
    torch._check(count >= 0)
    torch._check(count <= x.shape[1])
    return proj(x[:, :count])


FUNCTIONS = (rows_of_a_mask, listed_places, selected, an_item)
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


def exported(function: Function) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Picked(function).eval(), (X,))


def quantized(model: nn.Module | ExportedProgram, *args: object) -> ExportedProgram:
    return qcompile.quantize(model, args, calibration=[(X,)], progress=False)


def written(program: ExportedProgram, path: Path, target: str) -> bytes:
    qcompile.export_onnx(program, path, target=target)  # type: ignore[arg-type]
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


@pytest.mark.parametrize(
    "function", [rows_of_a_mask, *(pytest.param(f, marks=pytest.mark.slow) for f in FUNCTIONS[1:])]
)
def test_three_exports_of_two_quantizations_are_the_same_bytes(function: Function, tmp_path: Path) -> None:
    program = exported(function)
    before = str(program)
    first = quantized(program)
    files = [written(first, tmp_path / "m.onnx", "portable") for _ in range(3)]
    files.append(written(quantized(program), tmp_path / "n.onnx", "portable"))
    assert len(set(files)) == 1
    assert str(program) == before
    results = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    for got, want in zip(results, pytree.tree_leaves(first.module()(X)), strict=True):
        np.testing.assert_allclose(got, want.detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_both_targets(function: Function, tmp_path: Path) -> None:
    program = quantized(exported(function))
    for target in ("tensorrt", "portable"):
        files = [written(program, tmp_path / "m.onnx", target) for _ in range(3)]
        assert len(set(files)) == 1


def test_weights_in_a_file_of_their_own_are_the_same_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.onnx.save.EMBEDDED_BYTES", 100)
    model = Picked(rows_of_a_mask).eval()
    model.proj = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    program = quantized(model, X)
    files = [written(program, tmp_path / "m.onnx", "portable") for _ in range(3)]
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == len(set(files)) == 1


def test_tensorrt_refuses_before_it_builds(tmp_path: Path) -> None:
    program = quantized(Picked(rows_of_a_mask), X)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="tensorrt")
    assert any("size depends on data" in notice for notice in report.notices)
    assert report.quantized == {"proj": "fp8"}
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"NonZero makes a tensor whose size depends on data.*torch\.where"):
        qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)


class Experts(nn.Module):
    """The usual loop over experts: each works on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        chosen = nn.functional.one_hot(index, 3).permute(2, 1, 0)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(chosen[number])
            result = result.index_add(0, token, expert(x[token]).relu() * weights[token, choice, None])
        return result


@pytest.mark.slow
def test_a_loop_over_experts_runs_and_builds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = X.reshape(24, 16)
    program = qcompile.quantize(Experts(), (x,), calibration=[(x,)], progress=False)
    want = program.module()(x).detach().numpy()
    for target in ("portable", "tensorrt"):
        files = [written(program, tmp_path / f"{target}.onnx", target) for _ in range(3)]
        assert len(set(files)) == 1
        (got,) = qcompile.onnx_session(tmp_path / f"{target}.onnx").run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    pytest.importorskip("tensorrt_rtx")
    engine = qcompile.build_engine(tmp_path / "tensorrt.onnx", target="sm89", progress=False)
    assert engine.gemms["fp8"] and not engine.gemms["half"]  # what reads one tensor is merged
