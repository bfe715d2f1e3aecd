"""A quantized program that a user has decomposed is read, and exported, as the one that `quantize` made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from passes.graph import aten
from passes.normalize.rejoin import RejoinLinears
from passes.program import unlift
from passes.testing import count, declines, graph_of, rewrites
from qcompile.report.program import ProgramReport

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Rows in three axes, with a bias and without, one layer that reads a product as it is, and one in float."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.lm_head = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(x + self.down(self.up(x).relu()))
        return y.reshape(-1, 4)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", max=64), 1: Dim("rows", max=64)},)
    return qcompile.quantize(Heads().eval(), (X,), calibration=[X], dynamic_shapes=shapes, progress=False)


def test_what_torch_decomposed_is_joined(program: ExportedProgram) -> None:
    gm = unlift(program.run_decompositions())
    assert count(gm, aten.addmm.default) + count(gm, aten.mm.default) == 3
    rewrites(RejoinLinears, gm, X, fired=3, rtol=1e-3, atol=1e-3)
    assert count(gm, aten.addmm.default, aten.mm.default, aten.view.default) == 0
    assert count(gm, aten.linear.default) == 3 and count(gm, aten.reshape.default) == 1
    rewrites(RejoinLinears, unlift(program), X, fired=0)


def test_other_graphs_and_products_stay() -> None:
    w, b = torch.randn(4, 3), torch.randn(4)
    plain = graph_of(lambda x: torch.addmm(b, x, w.t()), torch.randn(2, 3))
    rewrites(RejoinLinears, plain, torch.randn(2, 3), fired=0)

    def quantized(x: Tensor, added: Tensor, **factors: float) -> Tensor:
        scale = torch.ones((), dtype=x.dtype)
        codes = torch.ops.qcompile.quantize(x, scale, format="int8")
        rows = torch.ops.qcompile.dequantize(codes, scale, format="int8", dtype=x.dtype)
        return torch.addmm(added, rows, w.t(), **factors)

    x, rows = torch.randn(2, 3), torch.randn(2, 4)
    declines(RejoinLinears, lambda x: quantized(x, b, alpha=2), x, reason="multiplied by a number")
    declines(RejoinLinears, quantized, x, rows, reason="no bias")


def test_report_and_file_are_those_of_the_program(program: ExportedProgram, tmp_path: Path) -> None:
    decomposed = program.run_decompositions()
    assert ProgramReport.of(decomposed) == ProgramReport.of(program)
    for target in ("tensorrt", "portable"):
        made = [
            qcompile.export_onnx(each, tmp_path / f"{name}.onnx", target=target, compare=X)  # type: ignore[arg-type]
            for name, each in (("a", program), ("b", decomposed))
        ]
        assert made[0].coverage == made[1].coverage == {"linear": (2, 3)}
        assert made[0].quantized == made[1].quantized and made[0].unquantized == made[1].unquantized
        found = [Counter(n.op_type for n in onnx.load(tmp_path / f"{name}.onnx").graph.node) for name in "ab"]
        assert found[0] == found[1] and "Gemm" not in found[0], found
    (got,) = qcompile.onnx_session(tmp_path / "b.onnx").run(None, {"x": X.numpy()})
    np.testing.assert_allclose(got, program.module()(X).detach().numpy(), rtol=2e-2, atol=2e-2)
