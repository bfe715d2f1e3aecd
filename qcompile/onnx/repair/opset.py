"""Raise the opset of a file as far as its quantizers need, with `onnx.version_converter`.

Integers need 13, in blocks 21. FP8 came with opset 19: an older file comes out with 19, one whose codes pass through
another operator on their way from Q to DQ with 21, a newer one with what it had. The converter never sees a large
weight.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import helper, version_converter

from qcompile.errors import RepairError
from qcompile.onnx.checks.opsets import TYPE_NEEDS, opset_version
from qcompile.onnx.inlining import function_key, inline_functions
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.loading import skeleton
from qcompile.onnx.names import describe
from qcompile.onnx.repair.legacy import DEQUANTIZE, FP8_NAMES, MICROSOFT, QUANTIZE, is_legacy
from qcompile.onnx.repair.nbits import is_nbits
from qcompile.onnx.repair.qoperators import is_qoperator
from qcompile.onnx.view import attribute, reads, walk
from qcompile.onnxfile.names import said

_FP8_OPSET = 19
_CHANNELS_OPSET = 13  # scales for each channel, and sums along axes that are an input
_HALF_OPSET = 19  # scales in half precision
_BLOCKS_OPSET = 21  # scales for each block, codes of 4 bits
_MOVES_FP8 = 21  # Transpose, Reshape and the like take FP8 from here on


def needed_opset(model: onnx.ModelProto) -> int:
    """The least opset that can say what a repair makes of `model`'s quantizers; 0 without any."""
    functions = {function_key(function) for function in model.functions}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = [*walk(model.graph), *(node for function in model.functions for node in function.node)]
    legacy = [node for node in nodes if is_legacy(node, functions)]
    need = max((_needs(node, types) for node in legacy), default=0)
    if any(is_qoperator(node) or node.op_type in (QUANTIZE, DEQUANTIZE) for node in nodes):
        need = max(need, _CHANNELS_OPSET)
    if any(is_nbits(node) for node in nodes):
        need = max(need, _BLOCKS_OPSET)
    codes = {node.output[0] for node in legacy if FP8_NAMES.get(node.op_type, node.op_type) == QUANTIZE}
    for node in nodes:
        if FP8_NAMES.get(node.op_type, node.op_type) != DEQUANTIZE and codes.intersection(node.input):
            need = max(need, _MOVES_FP8)
    return need


def _needs(node: onnx.NodeProto, types: dict[str, int]) -> int:
    need = _CHANNELS_OPSET if node.domain == MICROSOFT else _FP8_OPSET
    quantizes = FP8_NAMES.get(node.op_type, node.op_type) == QUANTIZE
    if attribute(node, "block_size") or (quantizes and attribute(node, "output_dtype") and len(node.input) < 3):
        need = 21
    if not quantizes and attribute(node, "output_dtype"):
        need = 23
    if types.get(node.input[1] if len(node.input) > 1 else "") == onnx.TensorProto.FLOAT16:
        need = max(need, _HALF_OPSET)
    return max([need, *(TYPE_NEEDS.get(types.get(name, 0), (0, 0))[0] for name in node.input)])


def raised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """`model` (of the file at `path`, weights on disk) with the opset that it needs; as it is if it has that.

    Raises: RepairError if `onnx.version_converter` cannot.
    """
    need, found = needed_opset(model), opset_version(model)
    if found >= need:
        return model
    small = inline_functions(skeleton(model, path))  # the converter would drop the bodies
    own = {function_key(function) for function in model.functions}
    if called := [node for node in walk(small.graph) if function_key(node) in own]:
        raise RepairError(
            f"{describe(called[0])} calls a function of another opset than {found}, the model's, which has to be "
            f"raised to {need}; export the model with opset {need} or later"
        )
    try:
        converted = version_converter.convert_version(small, need)
    except LIBRARY_ERRORS as error:
        raise RepairError(
            f"onnx.version_converter cannot raise opset {found} to {need}, which the quantizers need: "
            f"{said(error)}; export the model with opset {need} or later"
        ) from error
    result = onnx.ModelProto()
    result.CopyFrom(converted)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.doc_string, result.domain, result.model_version = model.doc_string, model.domain, model.model_version
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    kept = {tensor.name for tensor in converted.graph.initializer}
    read = {name for node in walk(converted.graph) for name in reads(node)}
    read |= {value.name for value in converted.graph.output}
    outside = [tensor for tensor in model.graph.initializer if tensor.name not in kept and tensor.name in read]
    result.graph.initializer.extend(outside)  # they were inputs of the skeleton
    declared = {value.name for value in model.graph.input}
    inputs = [value for value in converted.graph.input if value.name in declared]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    return result


def raise_ir_version(model: ir.Model) -> None:
    """The IR version that the opset and the element types ask for, if it is higher than the file's."""
    standard = [helper.make_opsetid("", model.opset_imports[""])]
    types = {int(value.dtype) for value in model.graph.initializers.values() if value.dtype is not None}
    model.ir_version = max(
        model.ir_version,
        helper.find_min_ir_version_for(standard, ignore_unknown=True),
        *(TYPE_NEEDS.get(elem_type, (0, 0))[1] for elem_type in types),
    )
