"""Every form that we write, opened with plain ONNX Runtime at every level: right numbers, or it does not load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qcompile

LEVELS = onnxruntime.GraphOptimizationLevel.__members__
NAMES = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
RECIPES = ("fp8", "fp8_gemm", "fp8_block", "fp8_per_channel_per_token", "int8", "int8_per_channel_per_token")
Model = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Mlp(nn.Module):
    """Three layers. Of float16 biases, those of the first are more than 65504 scales of its product."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(k, n, bias=bias) for k, n in ((32, 64), (64, 48), (48, 32)))
        self.activation = activation
        if bias:
            nn.init.normal_(self.a.bias, std=8)
            nn.init.normal_(self.b.bias, std=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.activation(self.a(x))).flip(-1).relu())


class Block(nn.Module):
    """LayerNorm and attention, with a mask or without."""

    def __init__(self, bias: bool, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.causal = nn.LayerNorm(32), causal
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=bias) for _ in range(4))
        if bias:
            nn.init.normal_(self.k.bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 16)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return x + self.out(out.transpose(-2, -3).flatten(-2))


def models(bias: bool) -> dict[str, Callable[[], Model]]:
    def x(*shape: int) -> tuple[torch.Tensor]:
        return (torch.randn(*shape, 32) * 2,)

    def mask(kind: Callable[[torch.Tensor], torch.Tensor]) -> Model:
        seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
        return Block(bias), (*x(2, 8), kind(seen))

    return {
        "relu, 2-D": lambda: (Mlp(torch.relu, bias), x(8)),
        "relu, 3-D": lambda: (Mlp(torch.relu, bias), x(2, 8)),
        "gelu, 3-D": lambda: (Mlp(nn.functional.gelu, bias), x(2, 8)),
        "attention": lambda: (Block(bias), x(2, 8)),
        "causal attention": lambda: (Block(bias, causal=True), x(2, 8)),
        "boolean mask": lambda: mask(lambda seen: seen),
        "additive mask": lambda: mask(lambda seen: torch.where(seen, 0.0, -1e4)),
    }


EVERYDAY = [
    ("relu, 3-D", "fp8", torch.float32),
    ("relu, 2-D", "fp8", torch.float16),
    ("relu, 3-D", "int8", torch.float16),
]
CASES = [
    pytest.param(
        name, recipe, dtype, bias, marks=() if bias and (name, recipe, dtype) in EVERYDAY else (pytest.mark.slow,)
    )
    for name in models(True)
    for recipe in RECIPES
    for dtype in (torch.float32, torch.float16)
    for bias in (True, False)
]


@pytest.mark.everyday(2)
@pytest.mark.parametrize(("name", "recipe", "dtype", "bias"), CASES)
def test_right_or_refused(name: str, recipe: str, dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    model, args = models(bias)[name]()
    program = qcompile.quantize(model.eval(), args, recipe=recipe, calibration=[args], dtype=dtype, progress=False)
    expected = program.module()(*args).numpy(force=True)
    for target in ("portable", "tensorrt") if name != "relu, 2-D" else ("portable",):
        report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)  # type: ignore[arg-type]
        named = [notice for notice in report.notices if "session.x64quantprecision" in notice]
        assert len(named) == recipe.startswith("int8")  # the one option that `opened` needs for right numbers
        exact = opened(tmp_path / "m.onnx", "ORT_DISABLE_ALL", args)
        assert exact is not None
        # float16 moves codes, and ONNX Runtime rounds less often than torch does
        assert distance(exact, expected) < (2e-5 if dtype == torch.float32 else 6e-2)
        for level in NAMES[1:]:
            found = opened(tmp_path / "m.onnx", level, args)
            if found is None:
                assert level != "ORT_ENABLE_BASIC", f"{target} does not load"
            else:
                bound = 2e-5 if dtype == torch.float32 else 4e-2
                assert distance(found, exact) < bound, f"{target}, {level}"


def opened(path: Path, level: str, args: tuple[torch.Tensor, ...]) -> Any:
    """The output in a plain session, None if ONNX Runtime refuses the file.

    On x86 without VNNI it multiplies INT8 with sums of pairs that saturate at 16 bits, unless this documented option
    is set; the FP8 files have no INT8, so that it changes nothing there.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = LEVELS[level], 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        assert "MatMulIntegerToFloat" in str(error) or "tensor(float8e4m3fn)" in str(error), error
        return None
    feeds = {value.name: arg.numpy() for value, arg in zip(session.get_inputs(), args, strict=True)}
    return session.run(None, feeds)[0]


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("target", ["portable", "tensorrt"])
@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 8)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_int8_runs_integer_kernels(target: str, shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    """A default session has no float GEMM, and no float copy of a weight, for a layer that is quantized."""
    args = (torch.randn(*shape, 32),)
    model = nn.Sequential(nn.Linear(32, 64, bias=bias), nn.GELU(), nn.Linear(64, 48, bias=bias), nn.LayerNorm(48))
    program = qcompile.quantize(
        model.eval(), args, recipe="int8", calibration=[args], dtype=torch.float32, progress=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("MatMulIntegerToFloat") == 2 and not {"MatMul", "Gemm", "FusedGemm"} & {*operators}
    assert [output.shape[1:] for output in session.get_outputs()] == [[*shape[1:], 48]]
