"""Files that no reader should follow are refused before any does, by one error that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.cli import main
from qcompile.engine.graph import OnnxGraph
from qcompile.errors import EngineError, QCompileError, RepairError, VerificationError
from qcompile.onnx.compare import run_onnx_intermediates
from qcompile.onnx.verify import verify_onnx
from qcompile.onnxfile.scopes import read_scopes

node = helper.make_node


def model(*nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> onnx.ModelProto:
    """x [2, 2] -> w, the nodes -> y."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    graph = helper.make_graph(list(nodes) or [node("MatMul", ["x", "w"], ["y"], name="gemm")], "g", [x], [y], [weight])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """i -> each of `calls`, one after the other -> o."""
    names = ["i", *(f"v{number}" for number in range(len(calls) - 1)), "o"]
    nodes = [node(call, [a], [b], domain="own") for call, a, b in zip(calls, names, names[1:], strict=False)]
    return helper.make_function("own", name, ["i"], ["o"], nodes, [helper.make_opsetid("own", 1)])


def calling(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    return model(node(functions[0].name, ["x"], ["y"], domain="own"), functions=functions)


def doubling() -> onnx.ModelProto:
    """Forty functions, each of which calls the next twice."""
    last = helper.make_function("own", "f40", ["i"], ["o"], [node("Relu", ["i"], ["o"])], [helper.make_opsetid("", 21)])
    return calling(*(function(f"f{k}", f"f{k + 1}", f"f{k + 1}") for k in range(40)), last)


def nested(depth: int) -> onnx.ModelProto:
    inner = node("Relu", ["x"], ["y0"])
    for level in range(depth):
        result = helper.make_tensor_value_info(f"y{level}", TensorProto.FLOAT, None)
        body = helper.make_graph([inner], "b", [], [result])
        other = helper.make_graph([node("Relu", ["x"], [f"y{level}"])], "b", [], [result])
        inner = node("If", ["c"], [f"y{level + 1}"], then_branch=body, else_branch=other)
    inner.output[0] = "y"
    return model(node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))), inner)


def weight(**changes: object) -> onnx.ModelProto:
    made = model()
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(made.graph.initializer[0], name)[:] = value
        else:
            setattr(made.graph.initializer[0], name, value)
    return made


def two_weights() -> onnx.ModelProto:
    made = model()
    made.graph.initializer.append(made.graph.initializer[0])
    return made


UNSOUND: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "functions": (
        lambda: calling(function("a", "b"), function("b", "a")),
        r"functions that call one another in a circle: own::a calls own::b calls own::a",
    ),
    "nodes": (
        lambda: model(
            node("Add", ["x", "b"], ["a"], name="one"), node("Relu", ["a"], ["b"]), node("Relu", ["a"], ["y"])
        ),
        r"circle of nodes: Add 'one' reads Relu 'b' reads Add 'one'",
    ),
    "doubling": (doubling, r"functions whose bodies are [\d,]+ nodes"),
    "two producers": (
        lambda: model(node("Relu", ["x"], ["y"], name="n"), node("Abs", ["x"], ["y"], name="m")),
        r"two producers of 'y': Relu 'n' and Abs 'm'",
    ),
    "two weights": (two_weights, "two initializers 'w'"),
    "two functions": (lambda: calling(function("a", "Relu"), function("a", "Abs")), "two functions own::a"),
    "nothing makes": (lambda: model(node("Add", ["x", "z"], ["y"])), "'z', which nothing makes"),
    "no output": (lambda: model(node("Relu", ["x"], []), node("Relu", ["x"], ["y"])), "Relu '', which has no output"),
    "inputs": (lambda: model(node("MatMul", ["x"], ["y"], name="n")), r"MatMul 'n', which has 1 inputs, not the 2"),
    "attribute": (lambda: model(node("Softmax", ["x"], ["y"], axis=0.5)), "'axis' is FLOAT, not the INT"),
    "element type": (lambda: model(node("Cast", ["x"], ["y"], to=99)), "names the element type 99"),
    "control characters": (lambda: model(node("Relu", ["x"], ["y"], name="\x1b[2J")), r"'\\x1b\[2J'"),
    "nesting": (lambda: nested(20), "graphs nested more than 16 deep"),
    "negative dims": (lambda: weight(dims=[-2, -2]), r"'w' that has negative dims"),
    "unknown type": (lambda: weight(data_type=77), "'w' that is of element type 77"),
}


def refusals(path: Path) -> list[str]:
    """What each of those that open files says of it."""
    said = []
    for error, reader in (
        (VerificationError, verify_onnx),
        (EngineError, OnnxGraph.load),
        (RepairError, lambda file: qcompile.repair_onnx(file, path.with_name("new.onnx"))),
        (QCompileError, qcompile.onnx_session),
        (QCompileError, lambda file: run_onnx_intermediates(file, {}, ["y"])),
    ):
        with pytest.raises(error) as caught:
            reader(path)  # type: ignore[operator]
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("case", UNSOUND)
def test_no_reader_follows_it(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, words = UNSOUND[case]
    path = tmp_path / "strange.onnx"
    path.write_bytes(made().SerializeToString())
    for text in refusals(path):
        assert str(path) in text
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(text)
    assert main(["inspect", str(path)]) in (1, 2)
    with pytest.raises(VerificationError, match=words):
        verify_onnx(made())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        *(("missing", "no ONNX file"), ("folder", "a directory"), ("empty", "is empty"), ("pipe", "no regular file")),
        *(("text", "no ONNX"), ("zeros", "no ONNX"), ("no graph", "no ONNX model"), ("no text", "no UTF-8")),
    ],
)
def test_what_is_no_file_or_no_model(case: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.onnx"
    contents = {
        **{"empty": b"", "text": b"hello", "zeros": bytes(4096), "no graph": b"\x08\x09"},
        "no text": model().SerializeToString().replace(b"gemm", b"\xff\xfe\xfd\xfc"),
    }
    if case in contents:
        path.write_bytes(contents[case])
    elif case == "folder":
        path.mkdir()
    elif case == "pipe":
        os.mkfifo(path)
    assert all(words in text and str(path) in text for text in refusals(path))


def test_nodes_in_any_order_and_names_of_branches_are_let_through(tmp_path: Path) -> None:
    onnx.save(nested(3), tmp_path / "m.onnx")
    assert OnnxGraph.load(tmp_path / "m.onnx").nodes
    unsorted = model(node("Relu", ["a"], ["y"]), node("Relu", ["x"], ["a"]))
    onnx.save(unsorted, tmp_path / "m.onnx")
    assert OnnxGraph.load(tmp_path / "m.onnx").nodes
    assert [check.name for check in verify_onnx(unsorted) if not check.passed] == ["checker"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("['', \"it's\", 'x']", ["", "it's", "x"]),
        ("[]", []),
        *((text, None) for text in ("", "3", "[['a'], 1]", "[1]", "{'a'}", "[" * 9000, "['\\x1b[2J']", "['\\d']")),
        ("['" + "a" * 30_000 + "']", None),
    ],
)
def test_only_flat_lists_of_names_are_scopes(text: str, names: list[str] | None) -> None:
    assert read_scopes(text) == names
