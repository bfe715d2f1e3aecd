"""One node of an ONNX model: as many inputs and outputs as its operator has, and attributes of its types."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping

import onnx
from onnx import AttributeProto, TensorProto

from qcompile.onnxfile.names import shown
from qcompile.onnxfile.payload import payload_problem
from qcompile.onnxfile.unsound import Unsound

_ELEMENT_TYPES = ("to", "output_dtype", "dtype")  # attributes that name one
# Of the operators on codes of TensorRT and ONNX Runtime, which have no schema here.
_VENDOR_KINDS = {
    **dict.fromkeys(("axis", "block_size", "output_dtype", "saturate", "N", "K", "bits", "group"), "INT"),
    **dict.fromkeys(("transA", "transB", "channels_last", "ceil_mode", "count_include_pad"), "INT"),
    **dict.fromkeys(("pads", "strides", "dilations", "kernel_shape", "perm"), "INTS"),
    **dict.fromkeys(("alpha", "beta"), "FLOAT"),
    "auto_pad": "STRING",
}
_ON_CODES = re.compile(r"(com\.microsoft|trt)?::(QLinear.*|QGemm|MatMulNBits|(TRT_FP8)?(Quantize|Dequantize)Linear)")
_FIELDS = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
}
KNOWN_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in `node`'s attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


@functools.cache
def _schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def check_node(node: onnx.NodeProto, opsets: Mapping[str, int], *, calls: bool, in_function: bool) -> None:
    """Raises Unsound.

    Args:
        calls: the node calls a function of the file, whatever the standard has by that name.
        in_function: it may name attributes of the function's call.
    """
    if not node.op_type:
        raise Unsound(f"has a node without an operator, '{node.name}'")
    if not any(node.output):
        raise Unsound(f"has {shown(node)}, which has no output")
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, 0)
    schema = _schema(node.op_type, version, domain) if version > 0 and not calls else None
    if schema is not None:
        _check_counts(node, schema)
        if node.op_type == "Constant" and len(node.attribute) != 1:
            raise Unsound(f"has {shown(node)}, which states {len(node.attribute)} values")
    vendor = schema is None and not calls and _ON_CODES.fullmatch(f"{domain}::{node.op_type}") is not None
    seen: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in seen:
            raise Unsound(f"has {shown(node)}, which states its attribute '{attribute.name}' twice")
        seen.add(attribute.name)
        if attribute.ref_attr_name and not in_function:
            raise Unsound(f"has {shown(node)}, whose attribute '{attribute.name}' is one of a function outside of any")
        if (problem := _attribute_problem(attribute, schema, vendor=vendor)) is not None:
            raise Unsound(f"has {shown(node)}, whose attribute '{attribute.name}' {problem}")


def _check_counts(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> None:
    for what, count, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise Unsound(f"has {shown(node)}, which has {count} {what}, not the {wanted} of its operator")


def _attribute_problem(
    attribute: onnx.AttributeProto, schema: onnx.defs.OpSchema | None, *, vendor: bool
) -> str | None:
    if attribute.ref_attr_name:
        return None
    kind = attribute.type
    if kind == AttributeProto.UNDEFINED:
        return "has no type"
    field = _FIELDS.get(kind)
    if field is not None and not attribute.HasField(field):
        return f"is to be a {AttributeProto.AttributeType.Name(kind)} and holds none"
    stated = schema.attributes.get(attribute.name) if schema is not None else None
    name, wanted = AttributeProto.AttributeType.Name(kind), str(stated.type) if stated is not None else ""
    known = _VENDOR_KINDS.get(attribute.name) if vendor else None
    if known is not None and known != name:
        return f"is {name}, not the {known} of its operator"
    if stated is not None and not wanted.endswith(f".{name}"):
        return f"is {name}, not the {wanted.rpartition('.')[2]} of its operator"
    if attribute.name in _ELEMENT_TYPES and kind == AttributeProto.INT and attribute.i not in (0, *KNOWN_TYPES):
        return f"names the element type {attribute.i}, which there is not"
    tensors = [attribute.t] if kind == AttributeProto.TENSOR else list(attribute.tensors)
    for tensor in tensors:
        if (problem := tensor_problem(tensor) or payload_problem(tensor, None)) is not None:
            return f"holds a tensor that {problem}"
    return None


def tensor_problem(tensor: onnx.TensorProto) -> str | None:
    """What is wrong with the type or the dims of `tensor`."""
    if tensor.data_type not in KNOWN_TYPES:
        return f"is of element type {tensor.data_type}, which there is not"
    if tensor.HasField("segment"):
        return "is stored in segments, which nothing reads"
    if any(dim < 0 for dim in tensor.dims):
        return f"has negative dims: {list(tensor.dims)[:20]}"
    return None


def type_problem(kind: onnx.TypeProto) -> str | None:
    """What is wrong with what the file says of a value's type. Nothing is: inference may find it."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        elem_type = getattr(kind, which).elem_type
        if elem_type and elem_type not in KNOWN_TYPES:
            return f"of element type {elem_type}, which there is not"
    elif which in ("sequence_type", "optional_type"):
        inner = getattr(kind, which)
        return (
            type_problem(inner.elem_type) if inner.HasField("elem_type") else "that is a sequence or optional of none"
        )
    elif which == "map_type":
        inner = kind.map_type
        if inner.key_type not in KNOWN_TYPES or not inner.HasField("value_type"):
            return "that is a map without types"
        return type_problem(inner.value_type)
    return None
