"""Shapes behind operators that ONNX cannot infer: judged by onnx.shape_inference, ONNX Runtime and the builder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference
from torch import nn

import qcompile
from qcompile.onnx.restate import restate_shapes

SIZES = {1: (2, 32), 2: (2, 32, 6), 3: (2, 32, 4, 5), 4: (2, 32, 2, 3, 4)}


class Normed(nn.Module):
    """Norms over channels, and a linear layer on the last axis behind them."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.norms = nn.Sequential(*norms)
        self.proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.proj(self.norms(x).movedim(1, -1))
        return result


MODELS = {
    "image": (Normed(nn.GroupNorm(4, 32)), 3),
    "sequence": (Normed(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv1d(32, 32, 3, padding=1), nn.GroupNorm(1, 32)), 2),
    "video": (Normed(nn.GroupNorm(4, 32, affine=False), nn.SiLU()), 4),
    "rows": (Normed(nn.GroupNorm(4, 32)), 1),
    "instance": (Normed(nn.InstanceNorm2d(32, affine=True)), 3),
    "batch": (Normed(nn.BatchNorm3d(32, track_running_stats=False)), 4),
    "response": (Normed(nn.LocalResponseNorm(3), nn.PixelUnshuffle(1)), 3),
}


def exported(name: str, path: Path, target: Any, dtype: torch.dtype, dynamic: bool) -> tuple[Any, torch.Tensor]:
    model, rank = MODELS[name]
    x = torch.randn(SIZES[rank])
    sizes = ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2)[:rank]},) if dynamic else None
    program = qcompile.quantize(
        model.eval(), (x,), recipe="fp8_gemm", calibration=[(x,)], dynamic_shapes=sizes, dtype=dtype, progress=False
    )
    report = qcompile.export_onnx(program, path, target=target)
    assert report.quantized == {"proj": "fp8"}
    return program, x


@pytest.mark.parametrize(
    ("name", "dynamic", "dtype"),
    [
        ("image", True, torch.float32),
        ("sequence", False, torch.float16),
        *[pytest.param(n, d, torch.float32, marks=pytest.mark.slow) for n in MODELS for d in (False, True)],
    ],
)
def test_norms_before_a_quantized_layer(name: str, dynamic: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    program, x = exported(name, tmp_path / "m.onnx", "portable", dtype, dynamic)
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    for batch in [x, torch.cat([x, -x])] if dynamic else [x]:
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        expected = program.module()(batch).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_they_build(name: str, dtype: torch.dtype, dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, x = exported(name, tmp_path / "m.onnx", "tensorrt", dtype, dynamic)
    size = tuple(x.shape)
    profiles = {"x": (size, size, tuple(2 * n if axis in (0, 2) else n for axis, n in enumerate(size)))}
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", **({"profiles": profiles} if dynamic else {}))
    assert engine.precisions["proj"] == "fp8"


def chain(count: int, *, typed: bool = True) -> ir.Model:
    """x -> GroupNormalization, `count` times -> Relu -> y, where only torch's notes tell shapes."""
    names = ["x", *(f"n{index}" for index in range(count)), "y"]
    norms = [
        helper.make_node("GroupNormalization", [before, "w", "w"], [after], num_groups=2)
        for before, after in pairwise(names[:-1])
    ]
    made = helper.make_graph(
        [*norms, helper.make_node("Relu", [names[-2]], ["r"]), helper.make_node("Relu", ["r"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(4, np.float32), "w")],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4, 3]) for n in names[1:-1] if typed],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.serde.deserialize_model(model)


def test_each_one_is_restated_once() -> None:
    model = chain(3)
    assert restate_shapes(model) == 3
    assert restate_shapes(model) == 0
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    inferred = {
        v.name: v.type.tensor_type for v in shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    }
    assert [d.dim_value for d in inferred["r"].shape.dim][1:] == [4, 3]
    assert [node.op_type for node in model.graph] == [*["GroupNormalization", "Cast", "Reshape"] * 3, "Relu", "Relu"]


def test_what_torch_does_not_know_stays() -> None:
    model = chain(2, typed=False)
    assert restate_shapes(model) == 0
    assert len(list(model.graph)) == 4


def test_nothing_is_restated_where_nothing_is_lost() -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) {y = Relu(x)}'
    )
    assert restate_shapes(ir.serde.deserialize_model(made)) == 0
