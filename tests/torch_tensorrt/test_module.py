"""`compile_module`, but for the GPU: the lowered graph goes through Torch-TensorRT's own interpreter, unbuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qcompile
from passes.program import unlift
from qcompile.torch_tensorrt import compile_module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, None, Tensor]:
        z: Tensor = self.down(self.up(x).relu())
        return z, None, x.transpose(0, 1) @ y


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the one function that needs a GPU: makes the network, and runs the graph in its place."""
    made: list[Any] = []

    def convert(gm: GraphModule, inputs: Sequence[Any], settings: Any, name: str) -> Any:
        from torch_tensorrt.dynamo.conversion import TRTInterpreter

        interpreter = TRTInterpreter(gm, inputs, compilation_settings=settings)
        interpreter._construct_trt_network_def()
        made.append((interpreter.ctx.net, inputs, interpreter))
        return gm

    import torch_tensorrt.dynamo.conversion

    monkeypatch.setattr(torch_tensorrt.dynamo.conversion, "convert_module", convert)
    return made


def program(dynamic: bool) -> tuple[Any, tuple[Tensor, Tensor]]:
    inputs = torch.randn(8, 64), torch.randn(8, 64)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = ({0: rows}, {0: rows}) if dynamic else None
    options: dict[str, Any] = {"dtype": torch.float32, "dynamic_shapes": shapes}
    return qcompile.quantize(Model(), inputs, calibration=[inputs], progress=False, **options), inputs


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_function_takes_and_gives_what_the_graph_does(dynamic: bool, networks: list[Any]) -> None:
    quantized, inputs = program(dynamic)
    run = compile_module(unlift(quantized), inputs)
    z, none, product = run(*inputs)
    expected = quantized.module()(*inputs)
    assert none is None
    torch.testing.assert_close(z, expected[0])
    torch.testing.assert_close(product, expected[2])


def test_dynamic_sizes_have_the_range_of_the_program(networks: list[Any]) -> None:
    quantized, inputs = program(dynamic=True)
    compile_module(unlift(quantized), inputs)
    ((network, specs, _),) = networks
    assert tuple(network.get_input(0).shape) == (-1, 64)
    assert [tuple(spec.shape["max_shape"]) for spec in specs] == [(64, 64), (64, 64)]


def test_what_the_engine_cannot_be_built_for_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_tensorrt.dynamo.conversion

    def fail(*_: Any) -> Any:
        raise AssertionError("no engine\nand a long trace")

    monkeypatch.setattr(torch_tensorrt.dynamo.conversion, "convert_module", fail)
    quantized, inputs = program(dynamic=False)
    with pytest.raises(qcompile.QCompileError, match=r"built no engine: no engine$"):
        compile_module(unlift(quantized), inputs)
