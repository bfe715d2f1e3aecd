"""Why the builder has no kernel for a convolution that a file quantizes: told before a build, and after it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from passes.capabilities import CONVOLUTIONS, is_plain_depthwise
from qcompile.engine.graph import OnnxGraph, place

__all__ = ["obstacle", "without_kernel"]

_FORMATS: Mapping[int | None, str] = {onnx.TensorProto.FLOAT8E4M3FN: "fp8", onnx.TensorProto.INT8: "int8"}


def obstacle(graph: OnnxGraph, conv: onnx.NodeProto, target: int = 0) -> str:
    """Why `target`, or some one, lacks a kernel for `conv`, by codes and size of its weight; empty if none is known."""
    fmt = CONVOLUTIONS.get(_FORMATS.get(graph.code_type(conv.input[1]), ""))
    dims = graph.code_dims(conv.input[1])
    if fmt is None or len(dims) < 3:
        return ""
    attributes = {attribute.name: attribute for attribute in conv.attribute}
    apart = [n for name in ("strides", "dilations") if name in attributes for n in attributes[name].ints]
    groups = attributes["group"].i if "group" in attributes else 1
    return fmt.unfit(dims[2:], is_plain_depthwise(dims, groups, apart), target) or ""


def without_kernel(graph: OnnxGraph, target: int) -> list[str]:
    """Each quantized convolution that `target` runs in half precision, with the reason: the file is right all the same.

    `quantize` leaves out what no target runs, so these are of a file for another target, or of another tool.
    """
    convolutions = [
        node for node in graph.nodes if node.op_type == "Conv" and all(map(graph.is_quantized, node.input[:2]))
    ]
    return [f"{place(node)}: {why}" for node in convolutions if (why := obstacle(graph, node, target))]
