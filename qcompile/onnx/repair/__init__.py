"""ONNX files that other tools quantized, turned into standard operators that TensorRT takes: one idea a file."""

from __future__ import annotations

from qcompile.onnx.repair.repair import repair_onnx
from qcompile.onnx.repair.report import RepairReport

__all__ = ["RepairReport", "repair_onnx"]
