"""Other people's graph tools over our files: legal, the same numbers, and no kernel more afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import qcompile

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")
gs = pytest.importorskip("onnx_graphsurgeon")
onnxsim = pytest.importorskip("onnxsim")
onnxslim = pytest.importorskip("onnxslim")
pytest.importorskip("polygraphy")

WIDTH, HEADS = 128, 4
Tool = Callable[[Path, Path], object]


class Block(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    """Patches, a block, and a head on two axes behind a ReLU."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, WIDTH, 8, 8), Block(causal), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1)))  # type: ignore[no-any-return]


def surgeon(path: Path, written: Path) -> None:
    graph = gs.import_onnx(onnx.load(path))
    onnx.save(gs.export_onnx(graph.fold_constants().cleanup().toposort()), written)


def polygraphy(path: Path, written: Path) -> None:
    command = [Path(sys.executable).parent / "polygraphy", "surgeon", "sanitize", "--fold-constants", path]
    subprocess.run([*command, "-o", written], check=True, capture_output=True)


TOOLS: dict[str, Tool] = {
    "onnxsim": lambda path, written: onnx.save(onnxsim.simplify(str(path))[0], written),
    "onnxslim": lambda path, written: onnx.save(onnxslim.slim(str(path)), written),
    "graphsurgeon": surgeon,
    "polygraphy": polygraphy,
}
# onnxslim 0.1.98 takes inputs that a function's body does not read from its signature, and leaves the calls as they are
BREAKS = [("onnxslim", "tensorrt", "long and causal")]
SIZES = {"short": 64, "long and causal": 192}  # 64 tokens, and 576: TRT_QuantizedAttention
CASES = [
    (recipe, target, form, dynamic)
    for recipe in sorted(qcompile.list_recipes())
    for target in ("tensorrt", "portable")
    for form in SIZES
    for dynamic in (False, True)
]


def numbers(path: Path, x: Tensor, recipe: str) -> Any:
    if "nvfp4" in recipe:  # ONNX Runtime has no FP4
        return ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})[0]
    return qcompile.onnx_session(path).run(None, {"x": x.numpy()})[0]


def kernels(path: Path, recipe: str, x: Tensor, dynamic: bool) -> int:
    size = tuple(x.shape[1:])
    profiles = {"x": ((1, *size), (2, *size), (4, *size))} if dynamic else None
    target = "sm120" if "nvfp4" in recipe else "sm89"
    return qcompile.build_engine(path, target=target, profiles=profiles, progress=False).kernels


def called(path: Path) -> list[str]:
    """The inputs of all functions of a file."""
    return [name for function in onnx.load(path).functions for name in function.input]


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("recipe", "target", "form", "dynamic"), CASES)
def test_a_tool_changes_nothing(recipe: str, target: Any, form: str, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, SIZES[form], SIZES[form])
    model, shapes = Net(causal=form != "short").eval(), ({0: torch.export.Dim("batch")},) if dynamic else None
    program = qcompile.quantize(
        model, (x,), recipe=recipe, calibration=[x], dynamic_shapes=shapes, dtype=torch.float16, progress=False
    )
    path = tmp_path / "m.onnx"
    qcompile.export_onnx(program, path, target=target)
    expected = numbers(path, x, recipe)
    built = kernels(path, recipe, x, dynamic) if target == "tensorrt" else 0
    for name, tool in TOOLS.items():
        written = tmp_path / f"{name}.onnx"
        tool(path, written)
        if (name, target, form) in BREAKS and "mask" in called(path):
            with pytest.raises(onnx.shape_inference.InferenceError):
                onnx.checker.check_model(str(written), full_check=True)
            continue
        onnx.checker.check_model(str(written), full_check=True)
        np.testing.assert_allclose(numbers(written, x, recipe), expected, rtol=0, atol=1e-6, err_msg=name)
        if built:
            assert kernels(written, recipe, x, dynamic) <= built, name
