"""What onnx and onnx-ir raise for models that they do not take: their C++ passes on whatever stopped it."""

from __future__ import annotations

import onnx_ir as ir
from onnx import checker, shape_inference, version_converter

LIBRARY_ERRORS = (
    checker.ValidationError,
    shape_inference.InferenceError,
    version_converter.ConvertError,
    ir.serde.SerdeError,
    *(RuntimeError, ValueError, IndexError, OverflowError, MemoryError, TypeError),
)
