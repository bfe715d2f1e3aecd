"""Forms that build but are slow or wrong: unfolded weights, Casts before a GEMM, mixed types, block weights."""

from __future__ import annotations

from typing import NamedTuple

import onnx
from onnx import TensorProto

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.checks.values import FLOAT8, type_name
from qcompile.onnx.names import describe
from qcompile.onnx.view import ModelView, attribute, reads
from qcompile.onnxfile.refused import refused

GEMMS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
# They move or repeat elements, so that a value behind them is still the dequantized tensor.
_LAYOUT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Slice", "Split", "Tile"}
_CASTS = {"Cast", "CastLike"}
_INT8 = {TensorProto.INT8, TensorProto.UINT8}


class Operand(NamedTuple):
    """A GEMM operand that comes from a DequantizeLinear, with the Casts passed on the way up."""

    dequantize: onnx.NodeProto
    casts: list[onnx.NodeProto]


def operands(view: ModelView, gemm: onnx.NodeProto) -> list[Operand]:
    """The dequantized ones of `gemm`'s factors (a bias is no factor)."""
    found = []
    for name in gemm.input if gemm.op_type == "Einsum" else gemm.input[:2]:
        node, casts = view.producer.get(name), list[onnx.NodeProto]()
        while node is not None and node.op_type in _LAYOUT | _CASTS:
            casts += [node] if node.op_type in _CASTS else []
            node = view.producer.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear":
            found.append(Operand(node, casts))
    return found


def float_weights(view: ModelView) -> Findings:
    """Weights are stored as codes: no QuantizeLinear of a constant, and no initializer that no output needs."""
    problems = [
        f"{describe(node)} quantizes the constant '{node.input[0]}'; fold it into codes"
        for node in view.of_type("QuantizeLinear")
        if node.input[0] in view.constants
    ]
    needed = {value.name for value in view.model.graph.output}
    for outer in reversed(view.model.graph.node):
        if needed.intersection(outer.output):
            needed.update(reads(outer))
    for tensor in view.model.graph.initializer:
        if tensor.name not in needed:
            kind = f"{type_name(tensor.data_type)} {list(tensor.dims)}"
            problems.append(f"initializer '{tensor.name}' ({kind}) is used by no output; remove it")
    return Findings(problems, f"{len(view.model.graph.initializer)} initializers, all used, none left to quantize")


def casts(view: ModelView) -> Findings:
    """No Cast from DequantizeLinear to GEMM: the compute dtype is the scale's dtype, or the DQ's `output_dtype`.

    Blocks are the exception, of FP4 and of FP8 weights: their scales are float32. TensorRT refuses `output_dtype` on
    FP4 but sees through a Cast, and FP8 in blocks is dequantized by a kernel of its own, which does the Cast as well.
    """
    problems, gemms = [], view.of_type(*GEMMS)
    for gemm in gemms:
        for operand in operands(view, gemm):
            if attribute(operand.dequantize, "block_size"):
                continue
            problems += [
                f"{describe(c)} between {describe(operand.dequantize)} and {describe(gemm)}" for c in operand.casts
            ]
    return Findings(problems, f"{len(gemms)} GEMMs and convolutions, no Cast between them and their DequantizeLinear")


def gemm_types(view: ModelView) -> Findings:
    """Not FP8 on one side and 8-bit integers on the other: "Input and filter have to be the same type" in TensorRT."""
    problems, checked = [], 0
    for gemm in view.of_type(*GEMMS):
        types = {view.elem_type(operand.dequantize.input[0]) for operand in operands(view, gemm)}
        checked += bool(types)
        if types & FLOAT8 and types & _INT8:
            names = " and ".join(sorted(type_name(elem_type) for elem_type in types if elem_type))
            problems.append(
                f"{describe(gemm)} multiplies {names}; one of its zero points is missing or of the wrong type"
            )
    return Findings(problems, f"{checked} quantized GEMMs and convolutions")


def _is_block(view: ModelView, dequantize: onnx.NodeProto) -> bool:
    return bool(attribute(dequantize, "block_size")) or len(view.dims(dequantize.input[1]) or []) > 1


def block_weights(view: ModelView) -> Findings:
    """No FP8 weight with block scales against a per-tensor FP8 activation: TensorRT miscompiles it and says nothing."""
    problems, blocks = [], 0
    for gemm in view.of_type(*GEMMS):
        fp8 = [o.dequantize for o in operands(view, gemm) if view.elem_type(o.dequantize.input[0]) in FLOAT8]
        block = [dq for dq in fp8 if dq.input[0] in view.constants and _is_block(view, dq)]
        per_tensor = [dq for dq in fp8 if dq.input[0] not in view.constants and not _is_block(view, dq)]
        blocks += bool(block)
        problems += [
            f"{describe(gemm)}: block-scaled weight of {describe(weight)} with the per-tensor activation of "
            f"{describe(activation)} is miscompiled by TensorRT; use the K-split form or per-channel weights"
            for weight in block
            for activation in per_tensor
        ]
    return Findings(problems, f"{blocks} GEMMs with block-scaled FP8 weights, none with a per-tensor FP8 activation")


def tensorrt(view: ModelView) -> Findings:
    """No quantization that ONNX has and TensorRT refuses, or takes for another: INT32 biases, UINT8, QLinear."""
    problems = [f"{describe(node)}: {why}" for node, why in refused(view.flat, set(view.initializers))]
    return Findings(problems, "types and operators of all quantizers are TensorRT's, too")
