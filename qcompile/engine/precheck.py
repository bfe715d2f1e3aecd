"""Refuses, before a build, what the builder would refuse late or get wrong without a word."""

from __future__ import annotations

import logging

import onnx

from qcompile.engine.capability import lacking
from qcompile.engine.convolutions import without_kernel
from qcompile.engine.graph import OnnxGraph, module_path, place
from qcompile.engine.network import NetworkGraph
from qcompile.errors import EngineError
from qcompile.messages import some
from qcompile.onnxfile.refused import nodes_without_operator, refused

logger = logging.getLogger("qcompile")

_TYPES = {
    "nvfp4": ("FP4 (FLOAT4E2M1)", onnx.TensorProto.FLOAT4E2M1),
    "fp8": ("FP8 (FLOAT8E4M3FN)", onnx.TensorProto.FLOAT8E4M3FN),
}


def precheck(graph: OnnxGraph, target: int) -> None:
    """Raise EngineError for weights that are not there or of another size, types that the target cannot run,
    block-scaled FP8 weights in a static FP8 GEMM, and quantization in a file that TensorRT does not have: a network is
    made of TensorRT's own layers. Log a warning for quantized convolutions that the target runs in half precision."""
    graph.check_weights()
    problems = []
    if not isinstance(graph, NetworkGraph):
        problems = [f"{place(node)}: {why}" for node, why in refused(graph.model)]
    if problems:
        more = f"\n  and {len(problems) - 1} more of the kind" if len(problems) > 1 else ""
        raise EngineError(f"TensorRT cannot take the file: {problems[0]}{more}")
    for format, (name, data_type) in _TYPES.items():
        reason = lacking(format, target)
        if reason is not None and (where := _first(graph, data_type)) is not None:
            raise EngineError(f"{where} uses {name}, and {reason}")
    for node in graph.nodes:
        if node.op_type in ("MatMul", "Gemm") and _mixes_block_and_static(graph, node):
            raise EngineError(
                f"{place(node)}: an FP8 weight with block scales meets an activation with one static FP8 scale; "
                "TensorRT-RTX 1.7.1 builds this into a wrong result without saying so. Use per-tensor or per-channel "
                "weight scales, or leave the activation unquantized"
            )
    if left := without_kernel(graph, target):
        logger.warning("sm%d runs in half precision, with their quantizers left in: %s", target, some(left))


def check_operators(graph: OnnxGraph) -> None:
    """Raise EngineError for what TensorRT-RTX has no operator for: its parser says of most of it no more than that."""
    found = list(nodes_without_operator(graph.model.graph))
    if not found:
        return
    (node, does, way_out), *others = found
    more = f"; {len(others)} more are refused" if len(others) > 1 else "; one more is refused" if others else ""
    raise EngineError(
        f"TensorRT-RTX cannot take the file: {place(node)}: {node.op_type} {does}{more}."
        f" {way_out[0].upper()}{way_out[1:]}, or run the file in ONNX Runtime"
    )


def _first(graph: OnnxGraph, data_type: int) -> str | None:
    """The module path of the first node that makes or reads data of that type, None when there is none."""
    holding = {i.name for i in graph.model.graph.initializer if i.data_type == data_type}
    holding |= {i.name for i in graph.model.graph.input if i.type.tensor_type.elem_type == data_type}
    for node in graph.nodes:
        made = any(a.name == "output_dtype" and a.i == data_type for a in node.attribute)
        fp4 = data_type == onnx.TensorProto.FLOAT4E2M1 and node.op_type == "TRT_FP4DynamicQuantize"
        if made or fp4 or holding.intersection(node.input):
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
