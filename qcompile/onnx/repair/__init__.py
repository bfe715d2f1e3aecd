"""ONNX files with TensorRT's legacy FP8 operators, turned into files of standard operators: one idea a file."""

from __future__ import annotations

from qcompile.onnx.repair.repair import repair_onnx
from qcompile.onnx.repair.report import RepairReport

__all__ = ["RepairReport", "repair_onnx"]
