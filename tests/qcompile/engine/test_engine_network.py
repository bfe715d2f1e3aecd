"""A network that is built layer by layer is judged like a file. The layers are TensorRT's own; nothing lowers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from qcompile.engine.build import build_network
from qcompile.engine.report import EngineReport
from qcompile.errors import EngineError

trt = pytest.importorskip("tensorrt_rtx")

DIMENSIONS = {"q": [1, 4, "s", 32], "k": [1, 2, "s", 32], "v": [1, 2, "s", 32]}


class Source:
    """Causal attention with grouped heads, q, k and v in FP8 and the softmax too if `softmax`, then a linear layer."""

    package = "tensorrt_rtx"
    dimensions: Mapping[str, Sequence[int | str]] = DIMENSIONS

    def __init__(self, softmax: bool = True) -> None:
        self.softmax = softmax
        self.modules: list[str] = []
        self.kept: list[Any] = []  # TensorRT reads constants where they lie

    def static_shapes(self, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tuple(minima[name]) for name, tensor in zip("qkv", self.operands, strict=True)}

    def fill(self, network: Any) -> Source:
        self.network = network
        self.operands = [
            self.qdq(network.add_input(name, trt.float16, [d if isinstance(d, int) else -1 for d in dims]))
            for name, dims in DIMENSIONS.items()
        ]
        softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.UPPER_LEFT
        attention = network.add_attention_v2(*self.operands, softmax, causal)
        attention.decomposable = True
        if self.softmax:
            attention.normalization_quantize_scale = self.constant(np.float16(1 / 448), "softmax")
            attention.normalization_quantize_to_type = trt.DataType.FP8
        weight = self.constant(np.full((32, 64), 0.5, np.float16), "weight", (1, 1, 32, 64))
        operands = [self.qdq(attention.get_output(0)), self.qdq(weight)]
        plain = trt.MatrixOperation.NONE
        product = network.add_matrix_multiply(operands[0], plain, operands[1], plain)
        network.mark_output(product.get_output(0))
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            layer.name = f"{layer.type.name.lower()}_{index}"
            self.modules.append("block.proj" if layer.type == trt.LayerType.MATRIX_MULTIPLY else "block.attention")
        return self

    def constant(self, value: Any, name: str, shape: tuple[int, ...] = ()) -> Any:
        self.kept.append(np.ascontiguousarray(value))
        layer = self.network.add_constant(shape, trt.Weights(self.kept[-1]))
        layer.name = name
        return layer.get_output(0)

    def qdq(self, tensor: Any) -> Any:
        scale = self.constant(np.float16(1 / 64), "scale")
        codes = self.network.add_quantize(tensor, scale, trt.DataType.FP8).get_output(0)
        return self.network.add_dequantize(codes, scale, trt.float16).get_output(0)


def profile(least: int) -> dict[str, Any]:
    sizes = (least, 64, 128)
    return {name: tuple((1, heads, size, 32) for size in sizes) for name, heads in {"q": 4, "k": 2, "v": 2}.items()}


def build(source: Source, least: int = 32, **options: Any) -> EngineReport:
    return build_network(source, target="sm89", profiles=profile(least), progress=False, **options)


def test_attention_and_gemm_are_counted_and_named() -> None:
    report = build(Source())
    assert (report.attention.total, report.attention.fp8) == (1, 1)
    assert report.gemms["fp8"] == 1
    assert report.precisions == {"block.proj": "fp8"}
    assert report.not_low_precision == []
    assert report.builder.startswith("tensorrt_rtx ")


def test_what_is_not_quantized_is_told() -> None:
    report = build(Source(softmax=False))
    assert report.attention.fp8 == 0
    (gap,) = [gap for gap in report.not_low_precision if gap.kind == "attention"]
    assert gap.module == "block.attention" and "softmax output not quantized" in gap.reason


def test_too_few_keys_are_told() -> None:
    report = build(Source(), least=8)
    assert any("as short as 8" in gap.reason for gap in report.not_low_precision if gap.kind == "attention")


def test_a_missing_profile_names_the_dimensions() -> None:
    with pytest.raises(EngineError, match=r"q: \(1, 4, s, 32\); dynamic: s"):
        build_network(Source(), target="sm89", progress=False)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    monkeypatch.setattr(source, "package", "tensorrt", raising=False)
    with pytest.raises(EngineError, match="tensorrt"):
        build_network(source, target="sm89", progress=False)
