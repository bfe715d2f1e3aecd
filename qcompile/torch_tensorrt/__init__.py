"""Torch-TensorRT: programs as TensorRT networks without an ONNX file, and as modules that run on a GPU.

Importing this needs no torch_tensorrt; what is called here does.
"""

from __future__ import annotations

from qcompile.torch_tensorrt.module import compile_module
from qcompile.torch_tensorrt.network import ProgramNetwork

__all__ = ["ProgramNetwork", "compile_module"]
