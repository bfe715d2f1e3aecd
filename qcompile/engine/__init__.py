"""TensorRT engines: build one from an ONNX file, and report which kernels it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public

if TYPE_CHECKING:
    from qcompile.engine.build import build_engine
    from qcompile.engine.layer_list import parse_layers
    from qcompile.engine.layers import Layer, Tensor
    from qcompile.engine.limits import GenerationProfiles
    from qcompile.engine.report import AttentionCount, EngineReport, NotLowPrecision

__all__ = [
    "AttentionCount",
    "EngineReport",
    "GenerationProfiles",
    "Layer",
    "NotLowPrecision",
    "Tensor",
    "build_engine",
    "parse_layers",
]

_PLACES = {
    "build_engine": "qcompile.engine.build",
    "GenerationProfiles": "qcompile.engine.limits",
    "parse_layers": "qcompile.engine.layer_list",
    "Layer": "qcompile.engine.layers",
    "Tensor": "qcompile.engine.layers",
    "AttentionCount": "qcompile.engine.report",
    "EngineReport": "qcompile.engine.report",
    "NotLowPrecision": "qcompile.engine.report",
}
__getattr__, __dir__ = public(__name__, _PLACES)
