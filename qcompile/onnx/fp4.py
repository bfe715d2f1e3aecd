"""FP4 in ONNX: codes as FLOAT4E2M1 tensors, and TensorRT's operator that measures block scales at run time.

The IR holds two FP4 codes in a byte, as `uint8 [..., K / 2]`. torch.onnx writes torch's own packed type as FLOAT4E2M1
of the logical shape `[..., K]`, so the program is given that type right before it is converted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper
from onnxscript import values
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.formats import NVFP4, get_format
from passes.graph import is_call
from passes.ir import DEQUANTIZE, LEAST_BLOCK_SCALE, QUANTIZE
from passes.subgraphs import all_calls, outer_operands

DOMAIN = "trt"
NAME = "TRT_FP4DynamicQuantize"
BLOCK = NVFP4.block[-1]
FP4_OPSET, FP4_IR_VERSION = 23, 11
FLOAT4E2M1, FLOAT8E4M3FN = int(onnx.TensorProto.FLOAT4E2M1), int(onnx.TensorProto.FLOAT8E4M3FN)


def constant(name: str, value: Any) -> onnx.NodeProto:
    """A Constant of a function's body, as a tensor: graphsurgeon and onnxslim make float64 of a `value_float`."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))


def uses_fp4(program: ExportedProgram) -> bool:
    """Whether any tensor of `program` is dequantized from FP4."""
    return any(get_format(str(node.kwargs["format"])).is_fp4 for node in all_calls(program.graph_module, DEQUANTIZE))


def as_float4(program: ExportedProgram) -> None:
    """Give every tensor of packed codes in `program` torch's FP4 type, in place.

    It is done last: torch can neither index nor save that type.
    """
    weights = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    outside = dict(outer_operands(program.graph_module))
    for node in all_calls(program.graph_module, DEQUANTIZE):
        codes = node.args[0]
        assert isinstance(codes, Node)
        if not get_format(str(node.kwargs["format"])).is_fp4 or codes.meta["val"].dtype != torch.uint8:
            continue
        codes.meta["val"] = codes.meta["val"].view(torch.float4_e2m1fn_x2)
        while codes in outside:
            codes = outside[codes]
            codes.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
        if codes.name in weights:
            packed = program.state_dict[weights[codes.name]].detach().view(torch.float4_e2m1fn_x2)
            program.state_dict[weights[codes.name]] = torch.nn.Parameter(packed, requires_grad=False)
        elif is_call(codes, QUANTIZE):
            continue
        else:
            dynamic = codes.args[0]
            assert isinstance(dynamic, Node)
            dynamic.meta["val"] = (codes.meta["val"], dynamic.meta["val"][1])


def as_bytes(gm: GraphModule) -> None:
    """The weights of a graph that went through `as_float4` as bytes again, so that it can be run."""
    weights = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    for name, weight in weights:
        if weight.dtype == torch.float4_e2m1fn_x2:
            owner, _, leaf = name.rpartition(".")
            codes = weight.detach().view(torch.uint8)
            kept = torch.nn.Parameter(codes, requires_grad=False) if isinstance(weight, torch.nn.Parameter) else codes
            setattr(gm.get_submodule(owner), leaf, kept)


def _schema() -> onnx.defs.OpSchema:
    """The operator's signature, for onnxscript to build nodes of it."""
    parameter, attribute, kind = (
        onnx.defs.OpSchema.FormalParameter,
        onnx.defs.OpSchema.Attribute,
        onnx.defs.OpSchema.AttrType,
    )
    return onnx.defs.OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[parameter("x", "T"), parameter("global_scale", "tensor(float)")],
        outputs=[parameter("codes", "tensor(float4e2m1)"), parameter("block_scales", "tensor(float8e4m3fn)")],
        type_constraints=[("T", ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"], "floating-point types")],
        attributes=[attribute(name, kind.INT) for name in ("axis", "block_size", "scale_type")],
    )


FP4_DYNAMIC_QUANTIZE = values.Op(values.Opset(DOMAIN, 1), NAME, _schema())


def fp4_dynamic_quantize_function(opset: int) -> onnx_ir.Function:
    """The body: `passes.ir.dynamic_quantize` of NVFP4 in standard operators, for an `x` of any rank."""
    node = helper.make_node
    nodes = [
        constant("six", np.float32(NVFP4.max)),
        constant("nought", np.float32(0)),
        constant("one", np.float32(1)),
        constant("least", np.float32(LEAST_BLOCK_SCALE)),
        constant("last", np.array([-1])),
        constant("block", np.array([BLOCK])),
        node("Cast", ["x"], ["wide"], to=onnx.TensorProto.FLOAT),
        node("Shape", ["x"], ["lead"], end=-1),
        node("Shape", ["x"], ["width"], start=-1),
        node("Div", ["width", "block"], ["count"]),  # not -1, which an empty batch leaves open
        node("Concat", ["lead", "count", "block"], ["blocks_shape"], axis=0),
        node("Reshape", ["wide", "blocks_shape"], ["blocks"]),
        node("Abs", ["blocks"], ["magnitudes"]),
        node("ReduceMax", ["magnitudes", "last"], ["amax"], keepdims=0),
        node("Mul", ["six", "global_scale"], ["unit"]),
        node("Div", ["amax", "unit"], ["raw"]),
        node("Equal", ["raw", "nought"], ["is_zero"]),
        node("Max", ["raw", "least"], ["at_least"]),
        node("Where", ["is_zero", "one", "at_least"], ["guarded"]),
        node("Cast", ["guarded"], ["block_scales"], to=FLOAT8E4M3FN),
        node("DequantizeLinear", ["block_scales", "global_scale"], ["scale"]),
        node("QuantizeLinear", ["wide", "scale"], ["codes"], axis=-1, block_size=BLOCK, output_dtype=FLOAT4E2M1),
    ]
    function = helper.make_function(
        DOMAIN,
        NAME,
        ["x", "global_scale"],
        ["codes", "block_scales"],
        nodes,
        [helper.make_opsetid("", opset)],
        ["axis", "block_size", "scale_type"],
    )
    return onnx_ir.serde.deserialize_function(function)
