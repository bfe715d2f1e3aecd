"""Quantized linear layers become a plain matrix product with the weight stored the way round that it needs."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, is_call, val
from passes.ir import DEQUANTIZE


class StoreWeightsTransposed(Pass):
    """Write a linear layer with a quantized weight as `matmul` with the codes stored `[K, N]`.

    Before:
        y = linear(x, dequantize(codes[N,K], s), bias)
    After:
        y = add(matmul(x, dequantize(transpose(codes)[K,N], s)), bias)

    Requires: `FoldWeights` ran; `FoldConstants` follows and stores the transposed codes.
    Ensures: the same product and scale, with the bias added after it.
    Declines when: never; a weight that is not quantized stays in its linear layer.
    Why: ONNX MatMul wants `[K, N]`. A Transpose before DequantizeLinear is refused by TensorRT, and one behind it is a
        node that every reader has to look through.
    """

    def rewrite(self, gm: GraphModule) -> None:
        matrices: dict[Node, Node] = {}  # layers that share a weight (ALBERT) go on sharing it
        for node in calls(gm.graph, aten.linear.default):
            weight = node.args[1]
            if is_call(weight, DEQUANTIZE) and is_constant_expression(weight.args[0]):  # type: ignore[union-attr]
                assert isinstance(weight, Node)
                if weight not in matrices:
                    matrices[weight] = _transposed(weight, node)
                self._rewrite(node, matrices[weight])
                self.fire()

    def _rewrite(self, node: Node, matrix: Node) -> None:
        emit = Emitter(node)
        result = emit(aten.matmul.default, node.args[0], matrix)
        if len(node.args) > 2 and node.args[2] is not None:
            result = emit(aten.add.Tensor, result, node.args[2])
        node.replace_all_uses_with(result)


def _transposed(weight: Node, before: Node) -> Node:
    """The dequantize `weight` of the transposed codes."""
    emit = Emitter(before)
    codes, scale = weight.args
    assert isinstance(codes, Node) and isinstance(scale, Node)
    codes = emit(aten.transpose.int, codes, 0, 1)
    if val(scale).ndim == 2:
        scale = emit(aten.transpose.int, scale, 0, 1)
    return Emitter(before, like=weight)(DEQUANTIZE, codes, scale, **weight.kwargs)
