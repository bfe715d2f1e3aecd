"""The report of an export: coverage by module path, and JSON that reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile

X = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
RECIPE = """\
metadata: {name: partial, description: all but one layer and one operand of an attention}
rules:
  - {quantizer: "*input_quantizer", format: fp8}
  - {quantizer: "*weight_quantizer", format: fp8}
  - {quantizer: "*bmm_quantizer", format: fp8}
  - {quantizer: "lm_head.*", enable: false}
  - {quantizer: "layers.1.o.*", enable: false}
  - {quantizer: "layers.0.o.input_quantizer", enable: false}
  - {quantizer: "layers.1.v_bmm_quantizer", enable: false}
  - {quantizer: "router.*", enable: false}
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ExportedProgram:
    torch.manual_seed(0)
    recipe = tmp_path_factory.mktemp("recipe") / "partial.yaml"
    recipe.write_text(RECIPE)
    return qcompile.quantize(Model().eval(), (X,), recipe=recipe, calibration=[X], progress=False)


@pytest.fixture(scope="module")
def exported(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> tuple[qcompile.Report, Path]:
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    return qcompile.export_onnx(program, path, compare=X), path


def test_what_is_quantized_and_what_is_not(exported: tuple[qcompile.Report, Path]) -> None:
    report, _ = exported
    linears = {f"layers.{i}.{name}": "fp8" for i in range(2) for name in "qkv"}
    assert report.quantized == {**linears, "layers.0": "fp8", "layers.0.o": "fp8_weight_only"}
    assert report.unquantized == {"layers.1": "attention", "layers.1.o": "linear", "lm_head": "linear"}
    assert report.recipe == "partial" and report.target == "tensorrt" and report.opset == 21


def test_declines_and_notices(exported: tuple[qcompile.Report, Path]) -> None:
    report, _ = exported
    reasons = [(d.pass_name, d.module, d.reason) for d in report.declined]
    assert ("FuseAttentionQdq", "layers.1", "v of this attention is not quantized") in reasons
    assert not [r for r in reasons if r[1] == "layers.0" and r[0] == "FuseAttentionQdq"]
    (notice,) = report.notices
    assert "partial.yaml:10" in notice and "router" in notice
    assert report.fired["FuseAttentionQdq"] == 1 and report.fired["FoldWeights"] == 7


def test_operators_are_those_of_the_file(exported: tuple[qcompile.Report, Path]) -> None:
    report, path = exported
    model = onnx.load(path)
    assert sum(report.ops.values()) == len(model.graph.node)
    for op_type, count in report.ops.items():
        assert count == sum(node.op_type == op_type for node in model.graph.node), op_type
    assert list(report.ops.values()) == sorted(report.ops.values(), reverse=True)
    assert report.bytes == path.stat().st_size


def test_json_reads_back(exported: tuple[qcompile.Report, Path]) -> None:
    report, _ = exported

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(report.to_json(), parse_constant=refuse)
    assert data["kind"] == "export"
    for name in ("target", "opset", "recipe", "ops", "quantized", "unquantized", "fired", "notices", "bytes"):
        assert data[name] == getattr(report, name), name
    assert all(check["passed"] and check["detail"] for check in data["checks"])
    assert {d["module"] for d in data["declined"]} >= {"layers.1"}
    assert report.comparison is not None
    assert [d["name"] for d in data["comparison"]] == [d.name for d in report.comparison.differences]


def test_an_unquantized_program_has_an_empty_record(tmp_path: Path) -> None:
    plain = torch.export.export(Model().eval(), (X,))
    report = qcompile.export_onnx(plain, tmp_path / "m.onnx")
    assert report.quantized == {} and report.recipe == "" and report.notices == []
    assert len(report.unquantized) == 2 * 5 + 1
    assert json.loads(report.to_json())["comparison"] is None
