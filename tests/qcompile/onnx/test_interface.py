"""What a file calls its inputs, outputs and dimensions, and what it says of its origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.errors import ExportError

BATCH, LENGTH = Dim("batch", max=64), Dim("length", max=512)
Shape = list[str | int]


class Two(nn.Module):
    """Two layers of one input, which are merged, and a dictionary of results."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, masks: dict[str, Tensor], extra: list[Tensor]) -> dict[str, Tensor]:
        total = self.q_proj(x) * masks["a"] + self.k_proj(x) * extra[0]
        return {"sum": total, "double": torch.cat([total, total], 1)}


def inputs(batch: int = 2, length: int = 5) -> tuple[Any, ...]:
    return torch.randn(batch, length, 32), {"a": torch.randn(batch, length, 1)}, [torch.randn(batch, 1, 32)]


def program(shapes: Any) -> torch.export.ExportedProgram:
    args = inputs()
    return qcompile.quantize(Two().eval(), args, calibration=[args], dynamic_shapes=shapes, progress=False)


BOTH = {0: BATCH, 1: LENGTH}
SHAPES = {
    "mapping": {"x": BOTH, "masks": {"a": BOTH}, "extra": [{0: BATCH}]},
    "sequences": {"x": (BATCH, LENGTH, None), "masks": {"a": [BATCH, LENGTH, None]}, "extra": [(BATCH, None, None)]},
    "places": (BOTH, {"a": BOTH}, [{0: BATCH}]),
}


def interface(path: Path) -> dict[str, Shape]:
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_dimensions_are_called_as_the_user_called_them(shapes: Any, tmp_path: Path) -> None:
    qcompile.export_onnx(program(shapes), tmp_path / "m.onnx")
    assert interface(tmp_path / "m.onnx") == {
        "x": ["batch", "length", 32],
        "masks_a": ["batch", "length", 1],
        "extra_0": ["batch", 1, 32],
        "sum": ["batch", "length", 32],
        "double": ["batch", "2*length", 32],
    }


def test_dimensions_without_a_name_have_that_of_torch(tmp_path: Path) -> None:
    dynamic = {0: Dim.DYNAMIC, 1: LENGTH}
    shapes = {"x": dynamic, "masks": {"a": dynamic}, "extra": [{0: Dim.DYNAMIC}]}
    qcompile.export_onnx(program(shapes), tmp_path / "m.onnx")
    batch, *rest = interface(tmp_path / "m.onnx")["x"]
    assert isinstance(batch, str) and batch.startswith("s") and rest == ["length", 32]


def test_names_of_choice(tmp_path: Path) -> None:
    made = program(SHAPES["places"])
    names = {"input_names": ["pixels", "mask", "more"], "output_names": ["logits", "twice"]}
    report = qcompile.export_onnx(made, tmp_path / "m.onnx", compare=inputs(3, 7), **names)
    assert list(interface(tmp_path / "m.onnx")) == [*names["input_names"], *names["output_names"]]
    assert report.comparison is not None
    for wrong, said in (
        ({"input_names": ["a", "b"]}, "input_names has 2 names, and the program has 3: x, masks_a, extra_0"),
        ({"output_names": "logits"}, "output_names is a list of names, not 'logits'"),
        ({"output_names": ["logits", ""]}, "is a list of names"),
        ({"output_names": ["a", "a"]}, "have a twice"),
        ({"output_names": ["sum", "x"]}, "have x twice"),
    ):
        with pytest.raises(ExportError, match=said):
            qcompile.export_onnx(made, tmp_path / "other.onnx", **wrong)  # type: ignore[arg-type]
        assert not (tmp_path / "other.onnx").exists()


def test_merged_weights_and_the_origin_can_be_read(tmp_path: Path) -> None:
    qcompile.export_onnx(program(SHAPES["places"]), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    stored = {tensor.name for tensor in model.graph.initializer}
    assert {"q_proj+k_proj.weight", "q_proj+k_proj.bias"} <= stored and "q_proj.weight" not in stored
    origin = {entry.key: entry.value for entry in model.metadata_props}
    assert origin.pop("qcompile.version")
    assert origin == {"qcompile.recipe": "fp8", "qcompile.target": "tensorrt", "qcompile.calibration": "2 samples"}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_the_boundary_is_in_the_dtype_of_choice(target: Any, tmp_path: Path) -> None:
    made, args = program(None), inputs()
    path = tmp_path / "m.onnx"
    report = qcompile.export_onnx(made, path, target=target, io_dtype=torch.float16, compare=args)
    graph = onnx.load(path).graph
    halves = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert halves == {onnx.TensorProto.FLOAT16} and all(node.op_type != "Cast" for node in graph.node)
    assert report.comparison is not None and all(
        not d.problem and d.cosine > 0.999 for d in report.comparison.differences
    )
    with pytest.raises(ExportError, match=r"unknown io_dtype torch\.int8; known: torch\.float16"):
        qcompile.export_onnx(made, path, io_dtype=torch.int8)


def test_nodes_are_called_as_they_stand_in_the_model(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Two(), Two()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x - torch.relu(block(x, {"a": x}, [x])["sum"])
            return x

    x = torch.randn(2, 5, 32)
    made = qcompile.quantize(Outer().eval(), (x,), calibration=[x], progress=False)
    qcompile.export_onnx(made, tmp_path / "m.onnx")
    names = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert len(set(names)) == len(names)
    for block in "01":
        assert f"/blocks.{block}/q_proj+k_proj/MatMul" in names
    assert {name.rpartition("/")[0] for name in names} <= {
        *("", "/blocks.0", "/blocks.0/q_proj", "/blocks.0/q_proj+k_proj"),
        *("/blocks.1", "/blocks.1/q_proj", "/blocks.1/q_proj+k_proj"),
    }
