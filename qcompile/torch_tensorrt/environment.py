"""Loads torch_tensorrt, or says what is missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from qcompile.errors import EngineError

_INSTALL = "pip install 'qcompile[torch-tensorrt-rtx]' with a CUDA build of torch"
_INSTEAD = "; route='onnx' builds engines without it"


def require_torch_tensorrt() -> Any:
    """The package `torch_tensorrt`, with converters for the IR registered.

    Raises:
        EngineError: it is not installed, torch is a build for the CPU, or there is no GPU, without which the package
            does not load.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise EngineError(f"Torch-TensorRT is not installed: {_INSTALL}{_INSTEAD}")
    if torch.version.cuda is None:
        raise EngineError(f"torch {torch.__version__} is a CPU build, and Torch-TensorRT needs CUDA: {_INSTALL}")
    try:
        package = importlib.import_module("torch_tensorrt")
    except Exception as error:  # it prints, and raises bare exceptions, whatever goes wrong
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(f"torch_tensorrt cannot be loaded: {reason}{_INSTEAD}") from error
    importlib.import_module("qcompile.torch_tensorrt.converters")
    return package


def tensorrt_package() -> str:
    """The Python package of TensorRT that torch_tensorrt drives: tensorrt, or tensorrt_rtx in torch-tensorrt-rtx."""
    return str(require_torch_tensorrt().tensorrt_package_name)
