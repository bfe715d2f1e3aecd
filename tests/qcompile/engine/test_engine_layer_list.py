"""Lines of the layer list that are not kernels, of several profiles, of unknown forms, and damaged ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.engine import EngineReport, Layer, build_engine, parse_layers
from qcompile.engine.trt_build import checked_profiles
from qcompile.errors import EngineError, ExpectationError

# As TensorRT-RTX 1.7.1 prints them for two profiles of MatMul + Shape, the constants and formats cut short.
HALF = "Strides: [64,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }"
LINES = (
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], "
    "Outputs: [ { Name: s, Location: Device, Dimensions: [2], Datatype: Int64, Format: Format not available due to "
    "dynamic shapes }], ParameterType: ShapeH2D, shapeValues0: [-4, 64], TacticValue: 0x0000000000000000, StreamId: 0, "
    "Metadata: ",
    "Name: __mye26_0_myl1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: ",
    f"Name: node_of_y_myl1_1, LayerType: gemm, Inputs: [ {{ Name: x, Dimensions: [-1,64], {HALF}], "
    f"Constants: [ {{ Name: w, Dimensions: [64,64], {HALF}, {{ Name: a, Dimensions: [1], Strides: [1], "
    "StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], "
    f"Outputs: [ {{ Name: y, Dimensions: [-1,64], {HALF}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
    "Metadata: [ONNX Layer: node_of_y]",
    "Name: [ShapeHostToDeviceCopy 0] [profile 1], LayerType: ShapeHostToDevice, Inputs: [], "
    "Outputs: [ { Name: s [profile 1], Location: Device, Dimensions: [2], Datatype: Int64, Format: Format not "
    "available due to dynamic shapes }], ParameterType: ShapeH2D, shapeValues0: [-4, 64], "
    "TacticValue: 0x0000000000000000, StreamId: 0, Metadata: ",
    "Name: __mye26_0_myl3_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: ",
    "Name: node_of_y [profile 1]_myl3_1, LayerType: gemm, "
    f"Inputs: [ {{ Name: x [profile 1], Dimensions: [-1,64], {HALF}], Constants: [], "
    f"Outputs: [ {{ Name: y [profile 1], Dimensions: [-1,64], {HALF}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
    "Metadata: [ONNX Layer: node_of_y]",
)
JUNK = st.text(max_size=12) | st.sampled_from((", LayerType: ", " }], Outputs: [", "], ", "\n", "{ Name: "))
TAIL = "\n\nI/O Tensors:\n Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,64], Location: Device\n"


def block(*lines: str) -> str:
    return "Layers:\n" + "\n".join(lines) + TAIL


def test_sizes_handed_to_the_gpu_are_read_and_are_no_kernels() -> None:
    copy = parse_layers(block(*LINES), profiles=2)[0]
    assert (copy.name, copy.type, copy.tactic) == ("[ShapeHostToDeviceCopy 0]", "ShapeHostToDevice", "")
    assert [(t.name, t.datatype, t.shape) for t in copy.outputs] == [("s", "Int64", (2,))]
    assert not copy.is_kernel


def test_profiles_by_their_marks() -> None:
    assert [layer.profile for layer in parse_layers(block(*LINES), profiles=2)] == [0, 0, 0, 1, 1, 1]
    # a name of the user's that looks like a mark: no profile is left without a layer, so groups are dealt out
    lines = [LINES[2].replace("Name: x,", "Name: x [profile 1],"), LINES[5]]
    assert [layer.profile for layer in parse_layers(block(*lines), profiles=2)] == [0, 1]


@pytest.mark.parametrize(
    "line",
    [
        "Name: a, Kind: gemm",
        "Name: a",
        "Name: ",
        "something else",
        LINES[2].replace("Datatype: Half", "Type: Half", 1),
        LINES[2].replace("[-1,64]", "[-1,?]", 1),
        LINES[2].replace("[-1,64]", f"[{'9' * 5000}]", 1),
        LINES[2].replace("Outputs", "Results"),
        LINES[2].replace("Metadata", "Meta"),
    ],
)
def test_unknown_lines_are_kept(line: str) -> None:
    layers = parse_layers(block(LINES[1], line) if line.startswith("Name: ") else block(line, LINES[1]))
    assert [(layer.name, layer.is_kernel) for layer in layers if layer.type == "other"] == [(line, True)]
    [other] = [layer for layer in layers if layer.type == "other"]
    assert not (other.is_gemm or other.is_attention or other.is_convolution)
    assert [layer for layer in layers if layer.type != "other"] == parse_layers(block(LINES[1]))


def test_a_line_break_in_a_name() -> None:
    line = LINES[2].replace("node_of_y", "node\nof\n\ny")
    [layer] = parse_layers(block(line))
    assert layer.is_gemm and layer.onnx_nodes == ("node\nof\n\ny",)


def rest(layer: Layer) -> list[str]:
    tensors = (*layer.inputs, *layer.constants, *layer.outputs)
    texts = [layer.name, layer.type, layer.tactic, *layer.onnx_nodes]
    return [*texts, *(t.name for t in tensors), *(t.datatype for t in tensors)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_lines_lose_nothing(data: st.DataObject) -> None:
    """Whatever happens to one line, the others are read as before, and what it says is in a layer."""
    index = data.draw(st.integers(0, len(LINES) - 1))
    line = LINES[index]
    start = data.draw(st.integers(len("Name: "), len(line)))
    stop = data.draw(st.integers(start, min(len(line), start + 60)))
    damaged = line[:start] + data.draw(JUNK) + line[stop:]
    lose_nothing(index, damaged)


def test_a_cut_that_leaves_a_name_at_the_start_of_a_line() -> None:
    """What follows is an entry of its own: nobody can tell it from one."""
    cut = LINES[2].index("Name: w")
    lose_nothing(2, LINES[2][: cut - 2] + "\n" + LINES[2][cut:])


def lose_nothing(index: int, damaged: str) -> None:
    entries = re.split(r"\n(?=Name: )", damaged)
    after = len(LINES) - index - 1
    layers = parse_layers(block(*LINES[:index], damaged, *LINES[index + 1 :]), profiles=2)
    known = [parse_layers(block(other))[0] for other in LINES]
    others = [layer.model_copy(update={"profile": 0}) for layer in layers]
    assert others[:index] == known[:index] and others[len(others) - after :] == known[index + 1 :]
    for entry, hit in zip(entries, layers[index : len(layers) - after], strict=True):
        if hit.type == "other":
            assert hit.name == entry.rstrip("\n")
        else:
            assert all(text in entry for text in rest(hit))
            assert sum(len(t) for t in (hit.inputs, hit.constants, hit.outputs)) >= entry.count(" Dimensions: [")
        assert Layer.model_validate_json(hit.model_dump_json()) == hit


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(1, 4))
@example("Name: a_myl0_0, LayerType: gemm, Inputs: [], Outputs: [], Metadata: [profile 3]", 2)
def test_any_text_is_read(text: str, profiles: int) -> None:
    layers = parse_layers(block(text), profiles)
    assert "".join(layer.name for layer in layers if layer.type == "other") or not text.strip() or layers
    assert all(0 <= layer.profile < profiles for layer in layers)


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    """Attention over a concatenated past, `k` an output; the length of the keys is one, too, as int64."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["new"]),
        helper.make_node("Concat", ["past", "new"], ["k"], axis=1),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "k"], ["o"]),
        helper.make_node("Shape", ["k"], ["length"]),
    ]
    half, sizes = TensorProto.FLOAT16, {"x": [1, "n", 64], "past": [1, "p", 64], "o": [1, "n", 64], "k": [1, "m", 64]}
    values = {name: helper.make_tensor_value_info(name, half, dims) for name, dims in sizes.items()}
    length = helper.make_tensor_value_info("length", TensorProto.INT64, [3])
    weight = numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float16), "w")
    graph = helper.make_graph(nodes, "g", [values["x"], values["past"]], [values["o"], values["k"], length], [weight])
    path = tmp_path / "cache.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


DECODE = {"x": ((1, 1, 64),) * 3, "past": ((1, 32, 64), (1, 64, 64), (1, 128, 64))}
PREFILL = {"x": ((1, 32, 64), (1, 64, 64), (1, 128, 64)), "past": ((1, 0, 64),) * 3}


def test_a_cache_of_two_profiles(cache_file: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    by_dimension = [{"n": (1, 1, 1), "p": (32, 64, 128)}, PREFILL]
    both = build_engine(cache_file, target="sm89", profiles=by_dimension, progress=False)
    alone = [build_engine(cache_file, target="sm89", profiles=p, progress=False) for p in (DECODE, PREFILL)]
    assert "ShapeHostToDevice" in {layer.type for layer in both.layers}
    assert "other" not in {layer.type for layer in both.layers}
    assert [counts.kernels for counts in both.profiles] == [report.kernels for report in alone]
    assert [counts.gemms for counts in both.profiles] == [report.gemms for report in alone]
    assert both.kernels in [report.kernels for report in alone], "a kernel of both profiles is counted once"
    assert any("2 profiles: the counts are those of profile" in notice for notice in both.notices)
    assert [len(report.profiles) for report in alone] == [1, 1] and not alone[0].notices
    assert EngineReport.from_json(both.to_json()) == both


def test_every_profile_has_to_reach_what_is_expected(linear_file: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    shapes = [{"x": ((n, 64),) * 3} for n in (1, 128)]
    report = build_engine(linear_file(rows="rows"), target="sm89", profiles=shapes, progress=False)
    few, many = sorted(counts.kernels for counts in report.profiles)
    report.check({"kernels": many})
    better = report.model_copy(update={"kernels": few, "profiles": [*report.profiles[::-1]]})
    with pytest.raises(ExpectationError, match=r"kernels \(profile [01]\): at most"):
        better.check({"kernels": many - 1})


def test_inputs_whose_values_are_sizes(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    half, whole = TensorProto.FLOAT16, TensorProto.INT64
    inputs = [helper.make_tensor_value_info("x", half, ["a", "b"]), helper.make_tensor_value_info("s", whole, [2])]
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", half, ["c", "d"])])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    shapes: Any = {"x": ((1, 64), (4, 64), (8, 64))}
    report = build_engine(path, target="sm89", profiles={**shapes, "s": ((64, 1), (64, 4), (64, 8))}, progress=False)
    assert report.bytes
    with pytest.raises(EngineError, match=r"s: \(value 0, value 1\); dynamic: value 0, value 1"):
        build_engine(path, target="sm89", profiles=shapes, progress=False)
    with pytest.raises(EngineError, match="three shapes"):
        checked_profiles({"s": ((1,), (2,), (3,))}, {"s": [2]}, {"s": 2})
