"""Quantized convolutions as layers of a network: their codes, and the kernels that the ONNX route has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import EngineError
from tests.qcompile.frontends.resnet import IMAGES, LAYERS, recipe, resnet
from tests.torch_tensorrt.test_network import filled

X = IMAGES.repeat(1, 1, 2, 2)


def quantized(model: Any, x: torch.Tensor, fmt: str, granularity: str, **options: Any) -> Any:
    rules = recipe(fmt, granularity)
    return qcompile.quantize(model, (x,), recipe=rules, calibration=[(x,)], progress=False, **options)


@pytest.mark.parametrize(("fmt", "kind"), [("fp8", "FP8"), ("int8", "INT8")])
def test_codes_and_scales_are_those_of_the_program(fmt: str, kind: str) -> None:
    program = quantized(resnet(), IMAGES, fmt, "per_channel")
    (trt, _, network), known, _ = filled(program)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    held = iter(known.interpreter.ctx.cpu_weights_reference_holder)  # in order, with biases between them
    found: dict[str, tuple[str, torch.Tensor]] = {}
    assert sum(layer.type == trt.LayerType.CONVOLUTION for layer in layers) == 4
    axes = []
    for layer in layers:
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            tensor = next(tensor for tensor in held if tensor.numel() == layer.weights.size)
            found[layer.name] = layer.get_output(0).dtype.name, tensor.contiguous().reshape(-1).view(torch.uint8)
        elif layer.type == trt.LayerType.DEQUANTIZE and len(layer.get_input(0).shape) == 4:
            layer.__class__ = trt.IDequantizeLayer
            axes += [layer.axis] if layer.get_input(1).shape else []
    assert axes == [0, 0, 0, 0]
    for name in LAYERS[:-1]:
        codes = program.state_dict[f"{name}.weight"].contiguous().reshape(-1).view(torch.uint8)
        assert found[f"{name}.weight"][0] == kind and torch.equal(found[f"{name}.weight"][1], codes)


FORMS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "1-D": (lambda: nn.Conv1d(32, 32, 3, padding=1), (32, 20), "fp8"),
    "3-D": (lambda: nn.Conv3d(32, 32, 3, padding=1), (32, 4, 6, 6), "fp8"),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, groups=32), (32, 9, 9), "fp8"),
    "reflect": (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), (32, 9, 9), "fp8"),
    "same": (lambda: nn.Conv2d(32, 32, 4, padding="same"), (32, 9, 9), "fp8"),
    "wide": (lambda: nn.Conv2d(32, 32, 7, padding=3), (32, 9, 9), "half"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_routes_run_the_same_kernels(name: str) -> None:
    make, sizes, kind = FORMS[name]
    x = torch.randn(2, *sizes)
    program = quantized(
        nn.Sequential(make(), nn.ReLU()), x, "fp8", "per_tensor", dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    profiles = {"input": ((1, *sizes), (1, *sizes), (4, *sizes))}
    onnx, direct = (
        qcompile.build_engine(program, None, target="sm89", profiles=profiles, route=route, progress=False)
        for route in ("onnx", "torch_tensorrt")
    )
    assert direct.convolutions == onnx.convolutions and direct.convolutions[kind] == 1
    assert direct.kernels <= onnx.kernels and direct.precisions == onnx.precisions


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_network_of_residual_blocks(granularity: str) -> None:
    program = quantized(resnet(32), X, "fp8", granularity)
    onnx, direct = (
        qcompile.build_engine(program, None, target="sm89", route=route, progress=False)
        for route in ("onnx", "torch_tensorrt")
    )
    assert direct.convolutions == onnx.convolutions and direct.convolutions["fp8"] == 4
    assert direct.kernels == onnx.kernels and direct.precisions == onnx.precisions


def test_int8_needs_a_builder_that_has_it() -> None:
    """TensorRT-RTX 1.6, which Torch-TensorRT 2.14 brings, refuses every INT8 convolution; 1.7 has them."""
    import tensorrt_rtx as trt

    program = quantized(resnet(32), X, "int8", "per_channel")
    version = tuple(map(int, trt.__version__.split(".")[:2]))
    if version >= (1, 7):
        engine = qcompile.build_engine(program, None, target="sm89", route="torch_tensorrt", progress=False)
        assert engine.convolutions["int8"] == 4
        return
    with pytest.raises(EngineError, match=r"before 1\.7 has no INT8 convolutions"):
        qcompile.build_engine(program, None, target="sm89", route="torch_tensorrt", progress=False)
