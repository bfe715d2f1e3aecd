"""Are the constants of every Q/DQ what TensorRT and ONNX Runtime both take: scales > 0, zero points 0 and typed?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.fp4 import NAME as FP4_DYNAMIC_QUANTIZE
from qcompile.onnx.inlining import function_key
from qcompile.onnx.names import describe
from qcompile.onnx.view import Array, ModelView, attribute, walk

FLOAT8 = {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
}
_ANY_SIGN = {
    TensorProto.INT4,
    TensorProto.UINT4,
}  # ONNX Runtime and NNCF write negative ones, and every reader takes them
# E5M2 and the FNUZ variants: no TensorRT kernel reads them.
UNSUPPORTED = FLOAT8 - {TensorProto.FLOAT8E4M3FN}


def type_name(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type))


def scales(view: ModelView) -> Findings:
    """Every constant scale is > 0 and finite in its own dtype: 1e-8 is fine in fp32, and 0 in fp16; those of stored
    INT4 codes are finite. Each fits its data.

    Judged as stored and through the Casts above it. A scale that is computed from data cannot be judged here.
    """
    problems, verdicts = [], dict[tuple[str, bool], str | None]()
    nodes = view.of_type("QuantizeLinear", "DequantizeLinear")
    for node in nodes:
        name = node.input[1]
        int4 = node.op_type == "DequantizeLinear" and view.elem_type(node.input[0]) in _ANY_SIGN
        if (name, int4) not in verdicts:
            verdicts[name, int4] = _scale_problem(view.value(name), any_sign=int4)
        problem = verdicts[name, int4] or _size_problem(view, node)
        if problem:
            problems.append(f"{describe(node)}: scale '{name}' {problem}")
    for node, formal, value in _function_scales(view):
        if problem := _scale_problem(value):
            problems.append(f"{describe(node)}: {formal} {problem}")
    dynamic = sum(name not in view.constants for name, _ in verdicts)
    return Findings(
        problems, f"{len(verdicts) - dynamic} constant scales > 0 and finite, {dynamic} computed at run time"
    )


def _scale_problem(value: Array | None, *, any_sign: bool = False) -> str | None:
    if value is None:
        return None
    numbers = value.astype(np.float32) if value.dtype != np.float64 else value
    bad = ~((any_sign | (numbers > 0)) & np.isfinite(numbers))
    if not bad.any():
        return None
    first = float(numbers[bad][0]) if numbers.ndim else float(numbers)
    wanted = "finite" if any_sign else "> 0 and finite"
    return f"has {int(bad.sum())} of {bad.size} values not {wanted} in {value.dtype} (the first: {first})"


def _size_problem(view: ModelView, node: onnx.NodeProto) -> str | None:
    """One value, one for each channel, or one for each block of the axis: ONNX inference does not look."""
    scale, data = view.dims(node.input[1]), view.dims(node.input[0])
    axis, block = (attribute(node, name) for name in ("axis", "block_size"))
    axis = 1 if axis is None else axis
    if scale is None or data is None or (not block and scale in ([], [1])):
        return None
    if not -len(data) <= axis < len(data):
        return f"of shape {scale} is for axis {axis}, which data of {len(data)} axes have not"
    if not block and len(scale) == 1:
        right = data[axis] == scale[0] or not all(isinstance(dim, int) for dim in (data[axis], scale[0]))
        return None if right else f"has {scale[0]} values for the {data[axis]} channels of axis {axis}"
    if not block:
        return f"of shape {scale} is neither per tensor nor per channel, and there is no block_size"
    wanted = list(data)
    if isinstance(size := data[axis], int):
        wanted[axis] = math.ceil(size / block)
    known = (pair for pair in zip(scale, wanted, strict=False) if all(isinstance(dim, int) for dim in pair))
    if len(scale) == len(wanted) and all(found == dim for found, dim in known):
        return None
    return f"of shape {scale} has to be {wanted} for blocks of {block} along axis {axis} of {data}"


def _function_scales(view: ModelView) -> Iterator[tuple[onnx.NodeProto, str, Array | None]]:
    """Constant `*_scale` inputs and attributes of function calls: a builtin reads them, whatever the body does."""
    functions = {function_key(function): function for function in view.model.functions}
    for node in walk(view.model.graph):
        function = functions.get(function_key(node))
        if function is None:
            continue
        for formal, actual in zip(function.input, node.input, strict=False):
            if actual and formal.endswith("_scale"):
                yield node, f"input '{formal}'", view.value(actual)
        for entry in node.attribute:
            if entry.name.endswith("_scale") and entry.type == onnx.AttributeProto.FLOAT:
                yield node, f"attribute '{entry.name}'", np.array(entry.f, np.float32)


def zero_points(view: ModelView) -> Findings:
    """Zero points say the quantized type, and are 0.

    Without one (or `output_dtype`) QuantizeLinear makes uint8: the host tools then run 8-bit integers and say nothing.
    """
    problems, nodes = [], view.of_type("QuantizeLinear", "DequantizeLinear")
    for node in nodes:
        name = node.input[2] if len(node.input) > 2 else ""
        problem = _type_problem(view, node, name) or (_zero_problem(view, node, name) if name else None)
        if problem:
            problems.append(f"{describe(node)}: {problem}")
    return Findings(problems, f"{len(nodes)} Q/DQ with zero points that are 0, or a type from data or output_dtype")


def _type_problem(view: ModelView, node: onnx.NodeProto, name: str) -> str | None:
    quantizes = node.op_type == "QuantizeLinear"
    stated = view.elem_type(name) if name else None
    carried = (attribute(node, "output_dtype") or None) if quantizes else view.elem_type(node.input[0])
    if quantizes and not name and not carried:
        return "neither a zero point nor output_dtype, so that it quantizes to uint8"
    if stated and carried and stated != carried:
        source = "output_dtype" if quantizes else "the data"
        return f"zero point '{name}' is {type_name(stated)}, {source} {type_name(carried)}"
    made = stated or carried
    if made in UNSUPPORTED:
        return f"{type_name(made)} has no TensorRT kernel; use {type_name(TensorProto.FLOAT8E4M3FN)}"
    return None


def _zero_problem(view: ModelView, node: onnx.NodeProto, name: str) -> str | None:
    value = view.value(name)
    if value is None:
        return f"zero point '{name}' is not a constant"
    if np.any(value.astype(np.float32) != 0):
        return f"zero point '{name}' ({value.dtype}) is not 0"
    scale_size = view.size(node.input[1])
    if scale_size is not None and value.size != scale_size:
        return f"zero point '{name}' has {value.size} values, its scale {scale_size}"
    return None


def global_scales(view: ModelView) -> Findings:
    """Block scales are dequantized with the global scale that they were measured under.

    TensorRT fuses the pair either way, and a differing one gives wrong numbers without a word.
    """
    problems, pairs = [], 0
    made = {node.output[1]: node for node in walk(view.model.graph) if node.op_type == FP4_DYNAMIC_QUANTIZE}
    for node in walk(view.model.graph):
        quantize = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is None:
            continue
        pairs += 1
        own, other = (view.value(name) for name in (quantize.input[1], node.input[1]))
        if own is None or other is None or not np.array_equal(own, other):
            shown = [
                f"'{name}'" + ("" if value is None else f" ({value})")
                for name, value in ((quantize.input[1], own), (node.input[1], other))
            ]
            problems.append(f"{describe(quantize)} has the global scale {shown[0]}, and {describe(node)} {shown[1]}")
    return Findings(problems, f"{pairs} pairs of quantize and dequantize with equal, constant global scales")
