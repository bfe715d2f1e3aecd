"""torch.cond, while_loop and scan: what stands around their graphs is quantized, what stands in them is listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import qcompile
from qcompile.errors import ExportError

Held = Callable[[nn.Module, Tensor], Tensor]
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """`after(held(before(x)))`, with a layer `inner` for what is held."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.before, self.inner, self.after = (nn.Linear(16, 16) for _ in range(3))
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.held(self.inner, self.before(x)))
        return result


def cond(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = torch.cond(y.sum() > 0, lambda y: inner(y), lambda y: inner(y) * 2, (y,))
    return result


def nested(inner: nn.Module, y: Tensor) -> Tensor:
    def other(y: Tensor) -> Tensor:
        result: Tensor = torch.cond(y.mean() > 1, lambda y: inner(y), lambda y: y * 2, (y,))
        return result

    result: Tensor = torch.cond(y.sum() > 100, lambda y: y.cos(), other, (y,))
    return result


def loop(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, inner(y)), (torch.tensor(0), y))[1]
    return result


def steps(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = scan(lambda c, t: (c * 0.5 + t, inner(c + t)), y.new_zeros(16), y, dim=0)[1]
    return result


def quantized(model: nn.Module) -> torch.export.ExportedProgram:
    return qcompile.quantize(model, (X,), calibration=[(X,)], progress=False)


def checked(held: Held, path: Path, dtype: torch.dtype = torch.float32) -> qcompile.Report:  # type: ignore[name-defined]
    """The report of a portable file that gives the numbers of the program, which are those of the model."""
    torch.manual_seed(0)
    model = Holder(held).eval().to(dtype)
    program = qcompile.quantize(model, (X.to(dtype),), calibration=[(X.to(dtype),)], progress=False)
    report = qcompile.export_onnx(program, path, target="portable")
    with torch.no_grad():
        want, float_result = program.module()(X.to(dtype)), model(X.to(dtype))
    (got,) = qcompile.onnx_session(path).run(None, {"x": X.to(dtype).numpy()})
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-2, atol=2e-2)
    assert (want - float_result).norm() < 0.1 * float_result.norm()
    assert report.quantized == {"before": "fp8", "after": "fp8"}
    assert report.unquantized == {"inner": "linear"}
    assert report.coverage == {"linear": (2, 3)}
    assert any(decline.pass_name == "LeaveSubgraphs" for decline in report.declined)
    return report


@pytest.mark.parametrize("held", [cond, *(pytest.param(h, marks=pytest.mark.slow) for h in (nested, loop, steps))])
def test_around_a_graph_layers_are_quantized(held: Held, tmp_path: Path) -> None:
    checked(held, tmp_path / "m.onnx")


@pytest.mark.slow
def test_a_model_in_half_precision(tmp_path: Path) -> None:
    checked(cond, tmp_path / "m.onnx", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("held", [cond, loop, steps])
def test_engines(held: Held, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    qcompile.export_onnx(quantized(Holder(held)), tmp_path / "m.onnx", target="tensorrt")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    assert engine.gemms["fp8"] == 2


def test_what_onnx_has_not_is_named(tmp_path: Path) -> None:
    from torch._higher_order_ops.map import map as torch_map

    program = quantized(Holder(lambda inner, y: torch_map(lambda row: inner(row), y)))
    with pytest.raises(ExportError, match=r"map.*no form in ONNX"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")
