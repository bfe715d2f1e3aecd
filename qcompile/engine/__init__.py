"""TensorRT engines: build one from an ONNX file, and report which kernels it runs."""

from __future__ import annotations

from qcompile.engine.build import build_engine
from qcompile.engine.layer_list import parse_layers
from qcompile.engine.layers import Layer, Tensor
from qcompile.engine.report import AttentionCount, EngineReport, NotLowPrecision

__all__ = ["AttentionCount", "EngineReport", "Layer", "NotLowPrecision", "Tensor", "build_engine", "parse_layers"]
