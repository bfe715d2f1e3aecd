"""Small NVFP4 models, quantized and exported, for the tests of their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.recipe import Recipe


def recipe(rotate: bool = False, weight_only: bool = False) -> Recipe:
    """With the codes next to the weights, which an oracle can tell."""
    name = "nvfp4_weight_only" if weight_only else "nvfp4"
    rotated = ["rules[format=nvfp4].rotate=true"] if rotate else []
    return qcompile.load_recipe(name, ["calibration.algorithm=max", *rotated])


class Mlp(nn.Module):
    """Two linear layers, one of them without a bias."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def quantized(
    model: nn.Module, x: Tensor, *, dtype: torch.dtype = torch.float32, dynamic_shapes: Any = None, **options: bool
) -> ExportedProgram:
    return qcompile.quantize(
        model.eval(),
        (x,),
        recipe=recipe(**options),
        calibration=[(x,)],
        dtype=dtype,
        dynamic_shapes=dynamic_shapes,
        progress=False,
    )


def reference(path: Path | onnx.ModelProto, feeds: Mapping[str, Any]) -> np.ndarray:
    """The first output by the ONNX reference evaluator: ONNX Runtime has no FP4 on a CPU."""
    return ReferenceEvaluator(path if isinstance(path, onnx.ModelProto) else str(path)).run(None, dict(feeds))[0]


def by_program(program: ExportedProgram, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return program.module()(x).numpy()


def scalars(model: onnx.ModelProto) -> dict[str, Any]:
    """Name -> value of the initializers."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
