"""Target `torch_tensorrt`: what the back end hands over. Its own tests are in tests/torch_tensorrt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import qcompile.torch_tensorrt
from passes.graph import calls
from passes.ir import DEQUANTIZE
from tests.qcompile.dynamo.support import Mlp, compiled, reference


def test_weights_are_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[GraphModule] = []

    def compile_module(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder")) == 1
        assert len(list(calls(gm.graph, DEQUANTIZE))) == 2, "quantized, and not lowered to what torch runs"
        built.append(gm)
        gm.recompile()
        return gm.forward

    monkeypatch.setattr(qcompile.torch_tensorrt, "compile_module", compile_module)
    model, other, x = Mlp(), Mlp(), torch.randn(3, 16)
    run = compiled(model, target="torch_tensorrt")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x), reference(model, x))
        model.up.weight.mul_(-1)
        torch.testing.assert_close(run(x), reference(model, x))
        model.up.weight = nn.Parameter(other.up.weight.detach().clone())
        torch.testing.assert_close(run(x), reference(model, x))
    assert len(built) == 3, "an engine for each set of weights"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_torch_tensorrt() -> None:
    with pytest.raises(Exception, match="EngineError: Torch-TensorRT is not installed"):
        compiled(Mlp(), target="torch_tensorrt")(torch.randn(3, 16))
