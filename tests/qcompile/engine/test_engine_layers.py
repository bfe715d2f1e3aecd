"""Parsing the layer list, for what small real engines do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.engine import build_engine, parse_layers
from qcompile.errors import EngineError

# Cut from a TensorRT-RTX 1.7.1 log (constants shortened); \x1f is in the original.
SAMPLE = (
    "Layers:\n"
    "Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: \n"
    "Name: __mye2_myl0_1, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, "
    "EventId: 1, Metadata: \n"
    "Name: __myl_CastMulCastMulCastFc_myl0_2, LayerType: runtime_fusion, Inputs: [ { Name: q.1_2_myl0, "
    "Dimensions: [-1,64], Strides: [64,1], StrideOrder: [1,0], Datatype: FP8, Format: (Linear) Row major linear "
    "format }], Constants: [ { Name: c8_constantFP8_myl0, Dimensions: [64,64], Strides: [64,1], StrideOrder: [1,0], "
    "Datatype: FP8, Format: (Linear) Row major linear format }], Outputs: [ { Name: y, Dimensions: [-1,64], "
    "Strides: [64,1], StrideOrder: [1,0], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0] }], "
    "TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_[0], a]\x1f[ONNX Layer: node_MatMul_9]\n"
    "\n"
    "I/O Tensors:\n"
    " Name: x, IOMode: Input, DataType: Half, Dimensions: [1,64,64], Location: Device\n"
)


def test_frozen_sample() -> None:
    shape_call, wait, gemm = parse_layers(SAMPLE)
    assert not shape_call.is_kernel
    assert not wait.is_kernel
    assert gemm.is_kernel
    assert gemm.is_gemm
    assert not gemm.is_attention
    assert gemm.onnx_nodes == ("node_[0], a", "node_MatMul_9")
    assert gemm.inputs[0].shape == (-1, 64)
    operands = (gemm.inputs, gemm.constants, gemm.outputs)
    assert [[t.datatype for t in tensors] for tensors in operands] == [["FP8"], ["FP8"], ["Half"]]
    # both operands are stored in FP8, but the kernel casts them before it multiplies
    assert gemm.precision == "half"


def test_operands_of_a_real_gemm(linear_file: Callable[..., Path]) -> None:
    report = build_engine(linear_file("fp8"), target="sm89", progress=False)
    quantize, gemm, gelu = report.layers
    assert [(t.name, t.datatype, t.shape) for t in quantize.inputs] == [("x", "Half", (128, 64))]
    assert [(t.datatype, t.shape) for t in gemm.inputs] == [("FP8", (128, 64))]
    assert gemm.inputs == quantize.outputs
    assert (gemm.constants[0].datatype, gemm.constants[0].shape) == ("FP8", (64, 64))
    assert gemm.outputs[0] in gelu.inputs
    assert [t.shape for t in gelu.outputs] == [(128, 64)]


def test_no_layer_list_is_an_error() -> None:
    with pytest.raises(EngineError, match="no layer list"):
        parse_layers("Engine Layer Information:\nLayer(Constant): a")


def test_odd_node_names_come_back_from_the_builder(new_file: Any, tmp_path: Path) -> None:
    names = ["a, LayerType: gemm, Inputs: [", "b] {x: 1}", "_gemm_mha_v2", "", "c/[d]"]
    file = new_file()
    x = file.input("x", [128, 64])
    for index, name in enumerate(names):
        x = file.linear(x, 64, 64, "fp8", f"module{index}")
        [matmul] = [node for node in file.nodes[-2:] if node.op_type == "MatMul"]
        matmul.name = name
    file.output(x, [128, 64])
    report = build_engine(file.save(tmp_path / "m.onnx"), target="sm89", progress=False)
    assert report.gemms["fp8"] == len(names)
    assert report.attention.total == 0
    assert report.not_low_precision == []
    found = {name for layer in report.layers for name in layer.onnx_nodes}
    assert found.issuperset(name for name in names if name)


def test_module_falls_back_to_the_node_name(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.op("MatMul", file.input("x", [128, 64]), file.weight(64, 64, None), scope="")
    y = file.op("MatMul", x, file.weight(64, 64, None), scope="layers.1.fc")
    file.nodes[-1].metadata_props[0].value = "not a list ["
    file.output(y, [128, 64])
    report = build_engine(file.save(tmp_path / "m.onnx"), target="sm89", progress=False)
    assert [entry.module for entry in report.not_low_precision] == [node.name for node in file.nodes]


def test_json_round_trip(block_file: Callable[..., Path]) -> None:
    report = build_engine(block_file(None), target="8.9", progress=False)
    again = type(report).from_json(report.to_json())
    assert again == report
    assert again.not_low_precision[0].module == "layers.0.attn"
    with pytest.raises(EngineError, match="not an engine report"):
        type(report).from_json('{"kernels": 3}')
