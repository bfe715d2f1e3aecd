"""Programs with quantized convolutions through torch.compile: their numbers, and what each layer runs as."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qcompile
from passes.compat import cpu_has_vnni
from passes.lower.device import Device
from qcompile.dynamo import backend
from tests.qcompile.dynamo.support import assert_same, compiled
from tests.qcompile.frontends.resnet import IMAGES, LAYERS, recipe, resnet

DYNAMIC = torch.export.Dim.DYNAMIC


def program(fmt: str, granularity: str, dtype: torch.dtype = torch.float32) -> Any:
    return qcompile.quantize(
        resnet(), (IMAGES,), recipe=recipe(fmt, granularity), calibration=[IMAGES], dtype=dtype, progress=False,
        dynamic_shapes=({0: DYNAMIC},),
    ).module()  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "granularity", "target"),
    [
        ("int8", "per_channel", "eager"),
        ("fp8", "per_tensor", "eager"),
        pytest.param("int8", "per_channel", "inductor", marks=pytest.mark.slow),
        pytest.param("int8", "per_tensor", "inductor", marks=pytest.mark.slow),
        pytest.param("fp8", "per_tensor", "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_of_the_program_for_every_batch(fmt: str, granularity: str, target: str) -> None:
    module = program(fmt, granularity)
    run = compiled(module, None, dynamic=True, target=target, expect={"convolution": 4, "linear": 1})
    with torch.no_grad():
        for images in (IMAGES, IMAGES.repeat(3, 1, 1, 1)):
            assert_same(run(images), module(images))
    report = qcompile.explain(run)
    assert len(report.graphs) == 1 and report.graphs[0].coverage["convolution"] == (4, 4)
    if target == "eager":
        return
    codes = fmt == "int8" and cpu_has_vnni()
    kernel = "oneDNN convolution of codes" if codes else "convolution, weight dequantized before it"
    assert {report.kernels[name] for name in LAYERS[:-1]} == {kernel}
    assert len([decline for decline in report.declined if "dequantized before" in decline.reason]) == (
        0 if codes else 4
    )
    weights = sum(layer.weight.numel() for name in LAYERS if (layer := resnet().get_submodule(name)))
    assert report.graphs[0].weight_bytes < 1.2 * weights  # codes, not numbers


@pytest.mark.slow
def test_on_a_cuda_device_it_is_half_precision_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph for one, computed here: nothing in it is of a device."""
    monkeypatch.setattr(backend, "_device", lambda _: Device("cuda", (8, 9)))
    module = program("fp8", "per_tensor")
    run = compiled(module, None, target="inductor")
    with torch.no_grad():
        # the head is a product of codes there, which the CPU computes, too
        assert_same(run(IMAGES), module(IMAGES))
    report = qcompile.explain(run)
    assert {report.kernels[name] for name in LAYERS[:-1]} == {"convolution in float32"}
    assert sum("convolves no codes" in decline.reason for decline in report.declined) == 4
