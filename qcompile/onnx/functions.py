"""TensorRT's operators as model-local functions, each with a body of standard ONNX operators.

TensorRT recognises the name and uses its own kernel; the checker, shape inference, ONNX Runtime and the reference
evaluator read the body. `trt::TRT_QuantizedAttention` is here, `trt::TRT_FP4DynamicQuantize` in `qcompile.onnx.fp4`.
Attributes that only the body needs (`kv_repeats`, `kv_shape`) TensorRT ignores.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from onnx import helper
from onnxscript import values

from qcompile.onnx import fp4
from qcompile.onnx.fp4 import constant

DOMAIN = fp4.DOMAIN
NAME = "TRT_QuantizedAttention"
_ATTRIBUTES = ["normalization_quantize_to_type", "scale", "is_causal", "TRT_decomposable", "kv_repeats", "kv_shape"]
_INPUTS = ["query", "key", "value", "mask", "normalization_quantize_scale"]


def _schema() -> onnx.defs.OpSchema:
    """The operator's signature, for onnxscript to build nodes of it."""
    parameter, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
    attribute, kind = onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]
    return onnx.defs.OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[parameter(n, "T", param_option=option.Optional if n == "mask" else option.Single) for n in _INPUTS],
        outputs=[parameter("output", "T")],
        type_constraints=[("T", floats, "floating-point types")],
        attributes=[
            attribute("normalization_quantize_to_type", kind.INT),
            attribute("scale", kind.FLOAT),
            attribute("is_causal", kind.INT),
            attribute("TRT_decomposable", kind.INT),
            attribute("kv_repeats", kind.INTS),
            attribute("kv_shape", kind.INTS),
        ],
    )


QUANTIZED_ATTENTION = values.Op(values.Opset(DOMAIN, 1), NAME, _schema())


def quantized_attention_function(opset: int, *, masked: bool = False) -> onnx_ir.Function:
    """The body: `QDQ(softmax(q k^T + mask)) v`, keys and values repeated; the mask is the input of that name if
    `masked`, else the causal one."""
    zero = helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], np.zeros(1, ml_dtypes.float8_e4m3fn))
    node = helper.make_node

    def repeated(name: str) -> list[onnx.NodeProto]:
        return [
            node("Unsqueeze", [name, "two"], [f"{name}_5d"]),
            node("Expand", [f"{name}_5d", "kv_repeats"], [f"{name}_wide"]),
            node("Reshape", [f"{name}_wide", "kv_shape"], [f"{name}_all"]),
        ]

    nodes = [
        node("Constant", [], ["zero_point"], value=zero),
        constant("two", np.array([2])),
        *(_attribute_constant(name) for name in ("kv_repeats", "kv_shape")),
        *repeated("key"),
        *repeated("value"),
        node("Transpose", ["key_all"], ["key_t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["query", "key_t"], ["scores"]),
        *([] if masked else _causal()),
        node("Add", ["scores", "mask" if masked else "causal"], ["masked"]),
        node("Softmax", ["masked"], ["probabilities"], axis=-1),
        node("QuantizeLinear", ["probabilities", _INPUTS[4], "zero_point"], ["codes"]),
        node("DequantizeLinear", ["codes", _INPUTS[4], "zero_point"], ["quantized"]),
        node("MatMul", ["quantized", "value_all"], ["output"]),
    ]
    function = helper.make_function(
        DOMAIN, NAME, _INPUTS, ["output"], nodes, [helper.make_opsetid("", opset)], _ATTRIBUTES
    )
    return onnx_ir.serde.deserialize_function(function)


def _attribute_constant(name: str) -> onnx.NodeProto:
    """A Constant whose value is the calling node's attribute `name`."""
    constant = helper.make_node("Constant", [], [name])
    reference = onnx.AttributeProto(name="value_ints", ref_attr_name=name, type=onnx.AttributeProto.INTS)
    constant.attribute.append(reference)
    return constant


def _causal() -> list[onnx.NodeProto]:
    """`causal` = 0 where a query sees a key, and a large negative number elsewhere."""
    node = helper.make_node
    return [
        constant("hidden", np.float32(np.finfo(np.float16).min / 2)),
        constant("nought", np.float32(0)),
        constant("start", np.int64(0)),
        constant("step", np.int64(1)),
        constant("one", np.array([1])),
        *(line for axis, name in ((2, "rows"), (3, "columns")) for line in _range(axis, name)),
        node("Unsqueeze", ["rows", "one"], ["row"]),
        node("LessOrEqual", ["columns", "row"], ["visible"]),
        node("Where", ["visible", "nought", "hidden"], ["causal_float"]),
        node("CastLike", ["causal_float", "scores"], ["causal"]),
    ]


def _range(axis: int, name: str) -> list[onnx.NodeProto]:
    """`name` = 0, 1, ... as long as that axis of the scores."""
    return [
        helper.make_node("Shape", ["scores"], [f"{name}_shape"], start=axis, end=axis + 1),
        helper.make_node("Squeeze", [f"{name}_shape"], [f"{name}_count"]),
        helper.make_node("Range", ["start", f"{name}_count", "step"], [name]),
    ]


def body_of(call: onnx_ir.Node, opset: int) -> onnx_ir.Function:
    """What a call of one of TensorRT's operators stands for, in standard operators."""
    if call.op_type == NAME:
        return quantized_attention_function(opset, masked=call.inputs[3] is not None)
    return fp4.fp4_dynamic_quantize_function(opset)
