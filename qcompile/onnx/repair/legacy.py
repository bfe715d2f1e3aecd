"""Which nodes are legacy quantizers: TensorRT's own names, or the standard names in its domain or ONNX Runtime's.

trt::TRT_FP8QuantizeLinear(x, scale[, zero_point])        FP8 e4m3; its output is declared as uint8
trt::QuantizeLinear(x, scale, zero_point)                 what nvidia-modelopt 0.47 makes of it
trt::TRT_FP8DequantizeLinear(codes, scale[, zero_point])  codes in uint8, or in FP8
trt::DequantizeLinear(codes, scale[, zero_point])
com.microsoft::QuantizeLinear, DequantizeLinear           as the standard ones of opset 21; without a zero point, uint8
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from qcompile.onnx.names import NAME_SCOPES, path_of_scopes
from qcompile.onnx.view import STANDARD_DOMAINS

DOMAIN = "trt"
MICROSOFT = "com.microsoft"
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FP8_NAMES = {"TRT_FP8QuantizeLinear": QUANTIZE, "TRT_FP8DequantizeLinear": DEQUANTIZE}
FP8 = ir.DataType.FLOAT8E4M3FN
# They move elements only, so that codes behind them are still codes.
MOVES = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def is_legacy(node: ir.Node | onnx.NodeProto, functions: Collection[tuple[str, str, str]]) -> bool:
    """Whether `node` is a legacy quantizer. One that a function of the file gives a body to is not."""
    if (node.domain, node.op_type, node.overload) in functions:
        return False
    if node.op_type in FP8_NAMES:
        return node.domain in (DOMAIN, *STANDARD_DOMAINS)  # an old graph surgery drops the domain
    return node.domain in (DOMAIN, MICROSOFT) and node.op_type in (QUANTIZE, DEQUANTIZE)


def is_standard(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of the standard operators `op_types`."""
    return node is not None and node.op_type in op_types and node.domain in STANDARD_DOMAINS


def is_blocked(node: ir.Node) -> bool:
    """Scales for blocks along an axis: another scheme, which nothing here rewrites."""
    block = node.attributes.get("block_size")
    return block is not None and block.as_int() != 0


def channel_axis(node: ir.Node) -> int:
    """The axis of a quantizer with one scale for each channel; it may count from the back."""
    axis = node.attributes.get("axis")
    return 1 if axis is None else axis.as_int()


def zero_point_of(node: ir.Node) -> ir.Value | None:
    """The zero point of a quantizer, which may leave it out."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def is_opaque(node: ir.Node, model: ir.Model) -> bool:
    """Neither a standard operator nor a function of the file."""
    return node.domain not in STANDARD_DOMAINS and node.op_identifier() not in model.functions


def describe(node: ir.Node) -> str:
    """As `qcompile.onnx.names.describe`, for a node of onnx-ir."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    path = path_of_scopes(node.metadata_props.get(NAME_SCOPES, ""))
    name = f"{operator} '{node.name or node.outputs[0].name}'"
    return f"{name} (module '{path}')" if path else name
