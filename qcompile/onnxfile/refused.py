"""What TensorRT refuses in files of other quantizers, or builds into something else without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto

_STANDARD = ("", "ai.onnx")
_DEQUANTIZED = {
    *(TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1),
}
_MOVES = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Gather", "Concat"}
_SYMMETRIC = "quantize to INT8 with zero points of 0 (ActivationSymmetric and WeightSymmetric in onnxruntime)"
_INTEGER_OPERATORS = {
    "DynamicQuantizeLinear": "measures scales at run time; use constant scales, of calibration",
    **dict.fromkeys(("MatMulInteger", "ConvInteger"), "multiplies codes; write QuantizeLinear and DequantizeLinear"),
}
_SIZED_BY_DATA = ("NonZero", "NonMaxSuppression", "Compress", "Unique")


def is_sized_by_data(op_type: str, domain: str = "") -> bool:
    """Whether the values of an operator's input decide how large its output is: TensorRT-RTX has none of these."""
    return op_type in _SIZED_BY_DATA and domain in _STANDARD


def sized_by_data(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of `graph` and of graphs in it that make a tensor of a size that data decides."""
    for node in graph.node:
        if is_sized_by_data(node.op_type, node.domain):
            yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from sized_by_data(inner)


def refused(model: onnx.ModelProto, stored: Collection[str] = ()) -> Iterator[tuple[onnx.NodeProto, str]]:
    """(node, why TensorRT does not take it and the way out), for quantization that ONNX has and TensorRT has not.

    Args:
        model: values are not looked at, so that large weights may be empty.
        stored: inputs of the graph that stand for weights, if those are not in it.

    Zero points other than 0 and scales that are not positive are for who reads values.
    """
    types = _types(model.graph)
    stored = {*stored, *(tensor.name for tensor in model.graph.initializer)}
    producer = {name: node for node in model.graph.node for name in node.output if name}
    for node in model.graph.node:
        if node.op_type in _INTEGER_OPERATORS and node.domain in _STANDARD:
            yield node, f"TensorRT has no {node.op_type}, which {_INTEGER_OPERATORS[node.op_type]}"
        elif node.op_type.startswith("QLinear"):
            yield node, f"TensorRT has no {node.op_type}: write QuantizeLinear and DequantizeLinear (quant_format=QDQ)"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in _STANDARD:
            name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            why = _type_problem(types.get(name), name in stored) or _place_problem(node, producer, stored)
            if why:
                yield node, why


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types of what is stored, given, or made of codes."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            types.update((node.output[0], entry.t.data_type) for entry in node.attribute if entry.name == "value")
        elif node.op_type == "QuantizeLinear":
            stated = next((entry.i for entry in node.attribute if entry.name == "output_dtype"), 0)
            zero = node.input[2] if len(node.input) > 2 else ""
            types[node.output[0]] = types.get(zero, 0) or stated or TensorProto.UINT8
        elif node.op_type in (*_MOVES, "Clip") and node.input and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
        elif node.op_type == "Cast":
            types.update((node.output[0], entry.i) for entry in node.attribute if entry.name == "to")
    return types


def _type_problem(elem_type: int | None, is_constant: bool) -> str | None:
    if elem_type is None or elem_type in _DEQUANTIZED or elem_type == TensorProto.UNDEFINED:
        return None
    name = str(TensorProto.DataType.Name(elem_type))
    if elem_type == TensorProto.INT32:
        way = "qcompile repair folds such a bias to float" if is_constant else "leave it in float"
        return f"TensorRT dequantizes no INT32: {way}"
    if elem_type == TensorProto.UINT8 and not is_constant:
        return f"TensorRT builds UINT8 as INT8, so that codes above 127 are cut to 127: {_SYMMETRIC}"
    return f"TensorRT has no {name} quantization: {_SYMMETRIC}, or to FP8 (E4M3FN)"


def _place_problem(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], stored: Collection[str]) -> str | None:
    """A constant that is not right in front of its DQ."""
    name = node.input[0]
    between = producer.get(name) if node.op_type == "DequantizeLinear" else None
    while name in producer and producer[name].op_type in (*_MOVES, "Clip"):
        name = producer[name].input[0]
    if between is None or name not in stored:
        return None
    return (
        f"TensorRT takes constant codes right in front of their DequantizeLinear only, and {between.op_type} is between"
    )
