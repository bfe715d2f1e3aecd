"""Refuses, before a build, what the builder would refuse late or get wrong without a word."""

from __future__ import annotations

import onnx

from qcompile.engine.graph import OnnxGraph, module_path, node_name
from qcompile.errors import EngineError

_FP4_FROM = 100


def precheck(graph: OnnxGraph, target: int) -> None:
    """Raise EngineError for NVFP4 on a GPU without FP4, and for block-scaled FP8 weights in a static FP8 GEMM."""
    if target < _FP4_FROM and (where := _first_fp4(graph)) is not None:
        raise EngineError(
            f"{where} uses FP4 (FLOAT4E2M1), and sm{target} has no FP4 arithmetic: build for sm120 or sm121, or "
            "quantize with the recipe fp8 for this target"
        )
    for node in graph.nodes:
        if node.op_type in ("MatMul", "Gemm") and _mixes_block_and_static(graph, node):
            raise EngineError(
                f"{module_path(node)}: an FP8 weight with block scales meets an activation with one static FP8 scale; "
                "TensorRT-RTX 1.7.1 builds this into a wrong result without saying so. Use per-tensor or per-channel "
                f"weight scales, or leave the activation unquantized (node {node_name(node)})"
            )


def _first_fp4(graph: OnnxGraph) -> str | None:
    """The module path of the first node that makes or reads FP4 data, None when there is none."""
    fp4 = {i.name for i in graph.model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT4E2M1}
    for node in graph.nodes:
        made = any(a.name == "output_dtype" and a.i == onnx.TensorProto.FLOAT4E2M1 for a in node.attribute)
        if made or node.op_type == "TRT_FP4DynamicQuantize" or fp4.intersection(node.input):
            return module_path(node)
    return None


def _mixes_block_and_static(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    fp8 = {i.name for i in graph.model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT8E4M3FN}
    blocks = []
    for tensor in node.input[:2]:
        source = graph.producer(tensor)
        while source is not None and source.op_type in ("Transpose", "Cast"):
            source = graph.producer(source.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            return False
        size = next((a.i for a in source.attribute if a.name == "block_size"), 0)
        blocks.append(size > 0 and source.input[0] in fp8 if graph.is_constant(tensor) else size > 0)
        if not graph.is_constant(tensor) and size > 0:
            return False
    return any(blocks)
