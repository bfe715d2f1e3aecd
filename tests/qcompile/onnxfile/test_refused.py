"""What TensorRT refuses of other quantizers' files has one clear sentence in `build_engine`, `inspect` and `repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.precheck import precheck
from qcompile.errors import EngineError
from qcompile.onnx.verify import verify_onnx

SHAPE = [16, 64]


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> onnx.ModelProto:
    tensors = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in constants.items()]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def linear(weight: Any = np.int8, activation: Any = np.int8, *, clip: bool = False, bias: str = "") -> onnx.ModelProto:
    """x [16, 64] -> Q -> DQ -> MatMul with the DQ of codes [64, 64], per channel; `bias`: "Gemm" or "Add" of INT32."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    constants = {
        "s": np.array(2**-5, np.float32),
        "az": np.zeros((), activation),
        "w": rng.integers(0, 100, (64, 64)).astype(weight),
        "ws": np.full(64, 2**-8, np.float32),
        "wz": np.zeros(64, weight),
        "b": rng.integers(-5000, 5000, 64).astype(np.int32),
        "bs": np.full(64, 2**-13, np.float32),
        "low": np.array(1, weight),
    }
    nodes = [
        node("QuantizeLinear", ["x", "s", "az"], ["xq"], name="q"),
        node("DequantizeLinear", ["xq", "s", "az"], ["xd"], name="dq"),
        *([node("Clip", ["w", "low"], ["wc"], name="clip")] if clip else []),
        node("DequantizeLinear", ["wc" if clip else "w", "ws", "wz"], ["wd"], axis=1, name="wdq"),
    ]
    if bias:
        nodes.append(node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0, name="bdq"))
    if bias == "Gemm":
        nodes.append(node("Gemm", ["xd", "wd", "bd"], ["y"], name="gemm"))
    elif bias:
        nodes += [node("MatMul", ["xd", "wd"], ["m"], name="gemm"), node("Add", ["m", "bd"], ["y"])]
    else:
        nodes.append(node("MatMul", ["xd", "wd"], ["y"], name="gemm"))
    used = {name for made in nodes for name in made.input}
    return model_of(nodes, {name: value for name, value in constants.items() if name in used})


def uint4() -> onnx.ModelProto:
    weight = helper.make_tensor("w", TensorProto.UINT4, [64, 64], [3] * 4096)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0, block_size=16, name="wdq"),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    return model_of(nodes, {"w": weight, "s": np.full((4, 64), 0.1, np.float32)})


def dynamic() -> onnx.ModelProto:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="dynamic"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["y"]),
    ]
    return model_of(nodes, {})


def qlinear() -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("QLinearMatMul", ["xq", "s", "z", "w", "s", "z", "s", "z"], ["yq"], name="qlinear"),
        node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    return model_of(
        nodes, {"s": np.array(0.1, np.float32), "z": np.zeros((), np.int8), "w": np.ones((64, 64), np.int8)}
    )


REFUSED = {
    "bias of a Gemm": (lambda: linear(bias="Gemm"), r"bdq.*no INT32: qcompile repair folds"),
    "bias of an Add": (lambda: linear(bias="Add"), r"bdq.*no INT32: qcompile repair folds"),
    "uint8 activations": (lambda: linear(activation=np.uint8), r"q.*UINT8 as INT8.*above 127"),
    "uint8 weights": (lambda: linear(np.uint8), r"wdq.*no UINT8"),
    "int16": (lambda: linear(activation=np.int16), r"q.*no INT16"),
    "e5m2": (lambda: linear(ml_dtypes.float8_e5m2), r"wdq.*no FLOAT8E5M2"),
    "uint4": (uint4, r"wdq.*no UINT4"),
    "clip": (lambda: linear(clip=True), r"wdq.*Clip is between"),
    "dynamic": (dynamic, r"dynamic.*no DynamicQuantizeLinear"),
    "qlinear": (qlinear, r"qlinear.*no QLinearMatMul"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_named_before_the_parser(what: str, tmp_path: Path) -> None:
    make, pattern = REFUSED[what]
    onnx.save(make(), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=rf"(?s)cannot take the file: .*{pattern}"):
        precheck(OnnxGraph.load(tmp_path / "m.onnx"), 89)
    (check,) = (check for check in verify_onnx(tmp_path / "m.onnx") if check.name == "tensorrt")
    assert not check.passed and "TensorRT" in check.detail


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in REFUSED if what != "uint8 activations"])
def test_the_builder_refuses_it_indeed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="it is the judge")
    from qcompile.engine import build

    monkeypatch.setattr(build, "precheck", lambda graph, target: None)
    onnx.save(REFUSED[what][0](), tmp_path / "m.onnx")
    with pytest.raises(EngineError):
        qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)


@pytest.mark.slow
def test_uint8_is_built_with_the_kernels_of_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If TensorRT learns UINT8, the sentence about it can go."""
    pytest.importorskip("tensorrt_rtx", reason="it is the judge")
    from qcompile.engine import build

    monkeypatch.setattr(build, "precheck", lambda graph, target: None)
    layers = []
    for kind in (np.int8, np.uint8):
        onnx.save(linear(activation=kind), tmp_path / "m.onnx")
        layers.append(qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False).layers)
    assert [layer.tactic for layer in layers[0]] == [layer.tactic for layer in layers[1]]


@pytest.mark.parametrize("model", [linear(), linear(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn)])
def test_what_it_takes_is_not_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    precheck(OnnxGraph.load(tmp_path / "m.onnx"), 89)
    assert all(check.passed for check in verify_onnx(tmp_path / "m.onnx"))


@pytest.mark.parametrize("what", ["int16", "dynamic"])
def test_a_repair_that_leaves_it_says_so(what: str, tmp_path: Path) -> None:
    onnx.save(REFUSED[what][0](), tmp_path / "old.onnx")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert any("TensorRT does not take the new file" in notice for notice in report.notices)
