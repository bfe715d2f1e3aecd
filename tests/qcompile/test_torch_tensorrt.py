"""route="torch_tensorrt" where Torch-TensorRT is not: one error that says what to install."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import qcompile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is not None, reason="tests/torch_tensorrt tests it where it is installed"
)


def test_a_missing_package_names_the_extra() -> None:
    x = torch.randn(4, 64)
    program = qcompile.quantize(nn.Linear(64, 64), (x,), calibration=[x], progress=False)
    with pytest.raises(qcompile.QCompileError, match=r"qcompile\[torch-tensorrt-rtx\].*route='onnx'"):
        qcompile.build_engine(program, target="sm89", route="torch_tensorrt")


def test_the_module_is_importable() -> None:
    from qcompile.torch_tensorrt import compile_module

    with pytest.raises(qcompile.QCompileError, match="not installed"):
        compile_module(torch.fx.symbolic_trace(nn.Identity()), [])
