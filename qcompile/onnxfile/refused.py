"""What TensorRT refuses in files of other quantizers, or builds into something else without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_STANDARD = ("", "ai.onnx")
_MICROSOFT = "com.microsoft"  # of ONNX Runtime; TensorRT's parser reads operators by their names alone
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_DEQUANTIZED = {
    *(TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1),
}
_UNSIGNED = {TensorProto.UINT8, TensorProto.UINT4}
_MOVES = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Gather", "Concat"}
_SYMMETRIC = "quantize to INT8 with zero points of 0 (ActivationSymmetric and WeightSymmetric in onnxruntime)"
_MEASURES = "measures scales at run time; use constant scales, of calibration"
_MULTIPLIES = "multiplies codes; write QuantizeLinear and DequantizeLinear"
_WRITES = "computes on codes: qcompile repair writes QuantizeLinear and DequantizeLinear, if its scales are constant"
_OPERATORS = {
    **dict.fromkeys(("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"), _MEASURES),
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger16"), _MULTIPLIES),
    "QAttention": _MULTIPLIES,
    "QGemm": _WRITES,
    "MatMulNBits": "unpacks its weight: qcompile repair writes DequantizeLinear and MatMul",
}
_PLACES = "compute all places and choose with torch.where instead of x[mask], nonzero or unique"
_OUTSIDE = "compute it outside of the model"
# Operator -> what it does that TensorRT-RTX 1.7.1 has nothing for, and the way out.
_LACKING = {
    **dict.fromkeys(
        ("NonZero", "NonMaxSuppression", "Compress", "Unique"),
        ("makes a tensor whose size depends on data", _PLACES),
    ),
    **dict.fromkeys(
        ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"),
        ("works on the bits of integers", "compute masks as booleans"),
    ),
    "Det": ("is a determinant", _OUTSIDE),
    "DFT": ("is a Fourier transform", _OUTSIDE),
    "Col2Im": ("sums patches", "write nn.Fold as a transposed convolution with an identity as weight"),
    "Bernoulli": ("draws random numbers", _OUTSIDE),
}
_SUMS = (
    "reduces by index",
    "multiply with torch.nn.functional.one_hot of the index instead of index_add, scatter_add or accumulate=True",
)
_ANTIALIASED = "resizes with antialiasing", "resize without it, or before the model"
MAY_LACK = frozenset((*_LACKING, "ScatterND", "ScatterElements", "Resize"))
"""The operators of which `no_operator` knows something."""


def no_operator(node: onnx.NodeProto) -> tuple[str, str] | None:
    """What `node` does that TensorRT-RTX has no operator for, and the way out; None if it has one."""
    if node.domain not in _STANDARD:
        return None
    stated = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type in ("ScatterND", "ScatterElements"):
        reduction = stated["reduction"].s if "reduction" in stated else b"none"
        return None if reduction == b"none" else _SUMS
    if node.op_type == "Resize":
        return _ANTIALIASED if "antialias" in stated and stated["antialias"].i else None
    return _LACKING.get(node.op_type)


def nodes_without_operator(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str, str]]:
    """(node, what it does, the way out) for the nodes of `graph` and of graphs in it that `no_operator` knows."""
    for node in graph.node:
        if (why := no_operator(node)) is not None:
            yield node, *why
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_without_operator(inner)


def refused(model: onnx.ModelProto, stored: Collection[str] = ()) -> Iterator[tuple[onnx.NodeProto, str]]:
    """(node, why TensorRT does not take it and the way out), for quantization that ONNX has and TensorRT has not.

    Args:
        model: large weights may be empty, their values are not looked at.
        stored: inputs of the graph that stand for weights, if those are not in it.

    Zero points are read where they are in it. Scales that are not positive are for who reads values.
    """
    types, constants = _types(model.graph), _constants(model.graph)
    stored = {*stored, *(tensor.name for tensor in model.graph.initializer)}
    producer = {name: node for node in model.graph.node for name in node.output if name}
    for node in model.graph.node:
        known = node.domain in (*_STANDARD, _MICROSOFT)
        if known and (does := _OPERATORS.get(node.op_type, _WRITES if node.op_type.startswith("QLinear") else "")):
            yield node, f"TensorRT has no {node.op_type}, which {does}"
        elif known and node.op_type in _QUANTIZERS:
            name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            why = _type_problem(types.get(name), name in stored) or _place_problem(node, producer, stored)
            why = why or _zero_problem(node, constants) or _number_problem(node, constants)
            if why:
                yield node, why
        elif known and node.op_type in ("MatMul", "Gemm", "Conv") and (why := _pair_problem(node, producer, types)):
            yield node, why


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    made = ((node, entry) for node in graph.node if node.op_type == "Constant" for entry in node.attribute)
    tensors = {node.output[0]: entry.t for node, entry in made if entry.name == "value"}
    return tensors | {tensor.name: tensor for tensor in graph.initializer}


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
        return (
            "TensorRT builds UINT8 as INT8, so that codes above 127 are cut to 127: qcompile repair makes INT8 of what "
            f"is dequantized, or {_SYMMETRIC}"
        )
    if elem_type in _UNSIGNED and is_constant:
        return f"TensorRT has no {name} quantization: qcompile repair makes the codes signed"
    return f"TensorRT has no {name} quantization: {_SYMMETRIC}, or to FP8 (E4M3FN)"


def _zero_problem(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or not (zero.raw_data or zero.int32_data) or zero.data_location == zero.EXTERNAL:
        return None
    if not numpy_helper.to_array(zero).astype(np.float32).any():
        return None
    return (
        f"TensorRT takes zero points of 0 alone, which '{node.input[2]}' is not: qcompile repair adds it in front and "
        f"moves it into biases, or {_SYMMETRIC}"
    )


def _number_problem(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    """The builder takes no code that has no axis."""
    codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if codes is not None and not codes.dims:
        return "TensorRT dequantizes no single number: qcompile repair folds it to float"
    return None


def _pair_problem(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str | None:
    """A product of codes of two types."""
    found = []
    for name in node.input[:2]:
        source = producer.get(name)
        while source is not None and source.op_type in _MOVES:
            source = producer.get(source.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            return None
        found.append(types.get(source.input[0], 0))
    if set(found) != {TensorProto.INT8, TensorProto.INT4}:
        return None
    return "TensorRT multiplies no INT8 by INT4: qcompile repair widens codes with a scale for each tensor or channel"


def _place_problem(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], stored: Collection[str]) -> str | None:
    """A constant that is not right in front of its DQ."""
    name = node.input[0]
    between = producer.get(name) if node.op_type == "DequantizeLinear" else None
    while name in producer and producer[name].op_type in (*_MOVES, "Clip"):
        name = producer[name].input[0]
    if between is None or name not in stored:
        return None
    return (
        "TensorRT takes constant codes right in front of their DequantizeLinear only, and "
        f"{between.op_type} is between: qcompile repair computes it"
    )
