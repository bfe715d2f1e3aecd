"""Finds the attentions and GEMMs of an ONNX file, and which of their operands the file quantizes.

This is what tells "the file does not quantize it" from "the file does, and the builder made no use of it".
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from qcompile.engine.convolutions import obstacle
from qcompile.engine.graph import MOVES, REACH, OnnxGraph, module_path, node_name

_ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "TRT_QuantizedAttention", "TRT_Attention"})

# What may stand between Q @ K^T and the softmax (scale, mask, softcap), and between the softmax and P @ V.
_AFTER_SOFTMAX = MOVES | {"Mul", "Div", "Where", "IsNaN", "QuantizeLinear", "DequantizeLinear"}
_BEFORE_SOFTMAX = _AFTER_SOFTMAX | {"Add", "Sub", "Min", "Max", "Clip", "Tanh"}
_FORMATS: Mapping[int | None, str] = {onnx.TensorProto.FLOAT8E4M3FN: "fp8", onnx.TensorProto.INT8: "int8"}
# Products of codes without Q/DQ, as ONNX Runtime has them: (kind, operands that are not quantized).
_ON_CODES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), ("gemm", ())),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), ("gemm", ())),
    **dict.fromkeys(("ConvInteger", "QLinearConv"), ("conv", ())),
    "MatMulNBits": ("gemm", ("activation",)),
}
_BLOCK_ZERO_POINTS = "block_zero_points_"  # what a repair calls what zero points of blocks add to a product
_LOW_RANK = re.compile(r"svdquant_lora_[ab](_\d+)?$")  # and those of `passes.place.low_rank`
_ROTATION = "hadamard_"  # what the constants of `passes.place.rotate` are called in a file


@dataclass(frozen=True)
class Gemm:
    """A MatMul, Gemm, Einsum ("gemm") or Conv ("conv"), or one of ONNX Runtime's operators that multiply codes.

    `unquantized` labels its operands that are not dequantized; `is_rotation`: one is a Hadamard matrix of qcompile's;
    `obstacle`: why some target lacks a kernel for a quantized one of its size; `quantizer`: the node that makes the
    codes of a convolution's input, empty without one; `is_low_rank`: one is a factor of a low-rank part.
    """

    name: str
    module: str
    kind: str
    unquantized: tuple[str, ...]
    is_rotation: bool = False
    obstacle: str = ""
    quantizer: str = ""
    is_low_rank: bool = False

    @property
    def stays(self) -> str:
        """What it is where nothing quantizes it on purpose: `rotation` or `low-rank part`; empty for others."""
        return "rotation" if self.is_rotation else "low-rank part" if self.is_low_rank else ""


@dataclass(frozen=True)
class Attention:
    """One attention: the nodes that make it up and, of q, k, v and the softmax output, those that are not quantized.

    `format` is what k is quantized to, `fp8` or `int8`; None for anything else.
    `scores` is the tensor [..., Sq, Sk] of the decomposed form, None for an operator; `query` and `key` its operands.
    """

    module: str
    nodes: frozenset[str]
    unquantized: tuple[str, ...]
    scores: str | None
    query: str
    key: str
    format: str | None


def find_gemms(graph: OnnxGraph, attentions: list[Attention]) -> list[Gemm]:
    """Every GEMM and convolution that has work to do at run time and is no part of an attention."""
    taken = frozenset[str]().union(*(a.nodes for a in attentions))
    found = []
    for node in graph.nodes:
        if node.op_type in _ON_CODES:
            found.append(Gemm(node_name(node), module_path(node), *_ON_CODES[node.op_type]))
            continue
        operands = list(node.input[:2])
        is_product = node.op_type in ("MatMul", "Gemm", "Einsum", "Conv") and len(operands) == 2
        if not is_product or all(map(graph.is_constant, operands)) or node_name(node) in taken:
            continue
        if any(tensor.startswith(_BLOCK_ZERO_POINTS) for tensor in operands):
            continue
        labels = ("weight" if graph.is_constant(t) else "activation" for t in operands)
        missing = tuple(label for label, t in zip(labels, operands, strict=True) if not graph.is_quantized(t))
        kind = "conv" if node.op_type == "Conv" else "gemm"
        constants = [tensor for tensor in operands if graph.is_constant(tensor)]
        is_rotation = any(tensor.startswith(_ROTATION) for tensor in constants)
        is_low_rank = any(_LOW_RANK.search(tensor) for tensor in constants)
        of_convolution = (obstacle(graph, node), _quantizer(graph, node)) if kind == "conv" else ("", "")
        found.append(Gemm(node_name(node), module_path(node), kind, missing, is_rotation, *of_convolution, is_low_rank))
    return found


def _quantizer(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    dequantize = graph.producer(node.input[0])
    codes = graph.producer(dequantize.input[0]) if dequantize is not None and dequantize.input else None
    return node_name(codes) if codes is not None and codes.op_type == "QuantizeLinear" else ""


def find_attentions(graph: OnnxGraph) -> list[Attention]:
    """Attention operators, and each softmax between two products of activations."""
    return list(_attentions(graph))


def _attentions(graph: OnnxGraph) -> Iterator[Attention]:
    for node in graph.nodes:
        if node.op_type in _ATTENTIONS:
            yield _operator(graph, node)
        elif node.op_type == "Softmax":
            scores = _nearest_product(graph, node.input[0], upward=True)
            values = _nearest_product(graph, node.output[0], upward=False)
            # a classifier's softmax follows a product with a weight
            if scores is not None and values is not None and not any(map(graph.is_constant, scores.input[:2])):
                yield _decomposed(graph, node, scores, values)


def _operator(graph: OnnxGraph, node: onnx.NodeProto) -> Attention:
    missing = [label for label, t in zip("qkv", node.input[:3], strict=False) if not graph.is_quantized(t)]
    if not any(a.name == "normalization_quantize_to_type" for a in node.attribute):
        missing.append("softmax output")
    names = frozenset({node_name(node)})
    return Attention(
        module_path(node), names, tuple(missing), None, node.input[0], node.input[1], _format(graph, node.input[1])
    )


def _decomposed(graph: OnnxGraph, softmax: onnx.NodeProto, scores: onnx.NodeProto, values: onnx.NodeProto) -> Attention:
    downstream = _downstream(graph, softmax.output[0])
    operands = [("q", scores.input[0]), ("k", scores.input[1])]
    operands += [("softmax output" if tensor in downstream else "v", tensor) for tensor in values.input[:2]]
    missing = tuple(label for label, tensor in operands if not graph.is_quantized(tensor))
    names = frozenset(map(node_name, (softmax, scores, values)))
    query, key = scores.input[:2]
    return Attention(module_path(softmax), names, missing, softmax.output[0], query, key, _format(graph, key))


def _format(graph: OnnxGraph, tensor: str) -> str | None:
    return _FORMATS.get(graph.code_type(tensor))


def _nearest_product(graph: OnnxGraph, tensor: str, upward: bool) -> onnx.NodeProto | None:
    """The closest MatMul or Einsum above or below a tensor, through what may stand round a softmax."""
    passed = _BEFORE_SOFTMAX if upward else _AFTER_SOFTMAX
    queue, seen = deque([(tensor, 0)]), {tensor}
    while queue:
        here, depth = queue.popleft()
        producer = graph.producer(here)
        for node in ([producer] if producer is not None else []) if upward else graph.consumers(here):
            if node.op_type in ("MatMul", "Einsum"):
                return node
            if depth < REACH and node.op_type in passed:
                further = [t for t in (node.input if upward else node.output) if t and t not in seen]
                seen.update(further)
                queue.extend((t, depth + 1) for t in further)
    return None


def _downstream(graph: OnnxGraph, tensor: str) -> set[str]:
    """The tensors that hold a softmax's output, in whatever type and form, up to the product with V."""
    reached, queue = {tensor}, deque([tensor])
    while queue:
        for node in graph.consumers(queue.popleft()):
            if node.op_type in _AFTER_SOFTMAX:
                fresh = [t for t in node.output if t not in reached]
                reached.update(fresh)
                queue.extend(fresh)
    return reached
