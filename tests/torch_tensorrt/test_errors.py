"""What cannot be done is one error that says where and what instead."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.torch_tensorrt import compile_module


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.inner = Unsupported()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.layer(x))
        return result


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


def build(program: Any, **options: Any) -> Any:
    return qcompile.build_engine(program, route="torch_tensorrt", progress=False, **{"target": "sm89", **options})


def quantized(model: nn.Module, x: Tensor, recipe: str = "fp8", **options: Any) -> Any:
    return qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], progress=False, **options)


def test_an_operator_without_a_converter_is_named_with_its_module() -> None:
    program = quantized(Sorted(), torch.randn(64, 64), dtype=torch.float32)
    with pytest.raises(qcompile.QCompileError, match=r"no converter.*\n +inner: aten\.linalg_qr\.default"):
        build(program)


def test_a_program_of_another_target() -> None:
    program = quantized(nn.Linear(64, 64), torch.randn(4, 64), "nvfp4")
    with pytest.raises(qcompile.QCompileError, match="sm89 has no FP4 arithmetic"):
        build(program)
    with pytest.raises(qcompile.QCompileError, match="unknown target sm90: tensorrt_rtx"):
        build(program, target="sm90")


def test_a_missing_profile_names_the_input() -> None:
    program = quantized(nn.Linear(64, 64), torch.randn(4, 64), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with pytest.raises(qcompile.QCompileError, match=r"input: .*dynamic"):
        build(program)


def test_without_a_gpu_a_target_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(qcompile.QCompileError, match="name one, such as target='sm89'"):
        build(quantized(nn.Linear(64, 64), torch.randn(4, 64)), target=None)


def test_a_wrong_number_of_examples() -> None:
    gm = torch.fx.symbolic_trace(nn.Identity())
    gm.graph.output_node().args = ((next(iter(gm.graph.nodes)),),)
    with pytest.raises(qcompile.QCompileError, match="1 inputs, and there are 0 examples"):
        compile_module(gm, [])


def test_sizes_that_dynamo_hands_in_are_read_off_a_tensor() -> None:
    from qcompile.torch_tensorrt.lower import sizes_of_inputs

    gm = torch.fx.experimental.proxy_tensor.make_fx(lambda n, x: x.view(n, -1) + n, tracing_mode="symbolic")(
        6, torch.randn(6, 2, 2)
    )
    n = next(iter(gm.graph.nodes))
    if not isinstance(n.meta.get("val"), torch.SymInt):  # make_fx keeps a number as it is
        n.meta["val"] = gm.graph.find_nodes(op="placeholder")[1].meta["val"].shape[0]
    sizes_of_inputs(gm)
    assert [node.name for node in gm.graph.find_nodes(op="placeholder")] == ["x_1"]
    assert torch.equal(gm(x := torch.randn(6, 2, 2)), x.view(6, -1) + 6)


def test_the_package_of_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.torch_tensorrt.environment import require_torch_tensorrt

    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None))
    with pytest.raises(qcompile.QCompileError, match=re.escape("is a CPU build")):
        require_torch_tensorrt()
