"""Rewrites of the exported graph keep the numbers: rules of onnxscript that do not are left out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.compat.onnx import last_operator, quick_translation
from qcompile.onnx.optimize import _RULES, optimize


class Rows(nn.Module):
    """Adds to all rows, by an index that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, index = self.layer(x), self.index
        assert isinstance(index, Tensor)
        return y.index_add(0, index, x), y.index_put((index,), x, accumulate=True)


class Heads(nn.Module):
    """Multiplies head by head, with as many blocks as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.keys = nn.Linear(32, 32), nn.Parameter(torch.randn(2, 32, 13))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).reshape(1, 2, 2, -1, 32)  # heads, blocks
        return (y.reshape(1, 2, -1, 32) @ self.keys).reshape(1, 2, 2, -1, 13)


class Clamps(nn.Module):
    """Several of one tensor, and such that contradict each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        both = y.clamp(max=0.1).clamp(min=0.2), y.clamp(min=0.2).clamp(max=0.1)
        return *both, y.clamp(min=0.5, max=-0.5), y.clamp(max=-0.1).relu(), y.relu().clamp(max=-0.1)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("model", [Rows, Heads, Clamps])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_file_has_the_numbers_of_the_program(model: type[nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(48 if model is Heads else 4, 32).to(dtype)
    program = qcompile.quantize(model().eval().to(dtype), (x,), calibration=[(x,)], progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    results = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = program.module()(x)
    for got, want in zip(results, [expected] if isinstance(expected, Tensor) else expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-2, atol=1e-2)


def test_a_rule_looks_at_nodes_of_its_own_operator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(last_operator(rule) for rule in _RULES if rule.name)
    seen: set[str] = set()
    for rule in _RULES:
        match = rule._matcher.match

        def noted(model: ir.Model, graph: ir.Graph, node: ir.Node, _match: Any = match, **options: Any) -> Any:
            seen.add(node.op_type)
            return _match(model, graph, node, **options)

        monkeypatch.setattr(rule._matcher, "match", noted)
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a"]),
        onnx.helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        onnx.helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        onnx.helper.make_node("Sigmoid", ["c"], ["y"]),
    ]
    info = [onnx.helper.make_tensor_value_info(name, 1, [2, 8]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", info[:1], info[1:]))
    made = ir.serde.deserialize_model(model)
    optimize(made)
    assert [node.op_type for node in made.graph] == ["Relu", "Sigmoid"]
    assert seen == {"Transpose"}


def test_a_translation_without_detours_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 32)
    program = qcompile.quantize(Rows().eval(), (x,), recipe="fp8", calibration=[x], progress=False)
    qcompile.export_onnx(program, tmp_path / "quick.onnx")
    monkeypatch.setattr("qcompile.onnx.export.quick_translation", contextlib.nullcontext)
    qcompile.export_onnx(program, tmp_path / "slow.onnx")
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()


def test_what_was_replaced_is_put_back() -> None:
    from onnxscript.values import TracedOnnxFunction

    parsed = vars(TracedOnnxFunction)["function_ir"]
    with pytest.raises(ValueError, match="stop"), quick_translation():
        assert vars(TracedOnnxFunction)["function_ir"] is not parsed
        raise ValueError("stop")
    assert vars(TracedOnnxFunction)["function_ir"] is parsed
