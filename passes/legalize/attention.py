"""Quantized attention as matrix products and a softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.dependence import fixed_nodes
from passes.graph import Emitter, aten, calls, dtype, is_call, place_of, shape
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.subgraphs import all_calls


class DecomposeAttention(Pass):
    """Spell out an attention whose probabilities are quantized.

    Before:
        y = qcompile.attention(dq(q(x)), dq(q(k)), v, mask, s)
    After:
        kt = dequantize(quantize(transpose(k, -1, -2)))
        p = softmax(add(matmul(dq(q(x)), kt), mask))
        y = matmul(dequantize(quantize(p, s), s), v)

    Requires: `FuseAttentionQdq` made the node, so the attention scale is in front of the query's quantizer.
    Ensures: the same codes; the transpose of K comes before its Q, behind its DQ where no input reaches K; grouped keys
        and values are repeated before their Q; a causal mask is added as 0 and a large negative number.
    Declines when: `unless` holds, without a note: the back end has an operator for it.
    Why: TensorRT fuses this into one FP8 kernel that writes FP8 for the output projection, one kernel less than with
        its own quantized-attention operator; and every runtime can run it. Codes of K that are stored, and stored
        transposed, it does not fuse.
    """

    def __init__(self, unless: Callable[[Node], bool] = lambda node: False) -> None:
        super().__init__()
        self.unless = unless

    def check_ensures(self, gm: GraphModule) -> list[str]:
        left = (node for node in all_calls(gm, ATTENTION) if not self.unless(node))
        return [f"the attention at {place_of(node)} is left" for node in left]

    def rewrite(self, gm: GraphModule) -> None:
        causal: dict[tuple[object, ...], Node] = {}
        fixed = fixed_nodes(gm)
        for node in calls(gm.graph, ATTENTION):
            if not self.unless(node):
                self._rewrite(node, causal, fixed)
                self.fire()

    def _rewrite(self, node: Node, causal: dict[tuple[object, ...], Node], fixed: set[Node]) -> None:
        query, key, value, mask, scale = node.args
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        emit = Emitter(node)
        transposed = _before_qdq(key, shape(query)[1], transpose=key not in fixed)
        if key in fixed:
            transposed = emit(aten.transpose.int, transposed, -1, -2)
        scores = emit(aten.matmul.default, query, transposed)
        if node.kwargs["is_causal"]:
            scores = emit(aten.add.Tensor, scores, _causal_mask(query, key, causal, emit))
        if mask is not None:
            scores = emit(aten.add.Tensor, scores, mask)
        probabilities = emit(aten.softmax.int, scores, -1)
        fmt = node.kwargs["format"]
        codes = emit(QUANTIZE, probabilities, scale, format=fmt)
        quantized = emit(DEQUANTIZE, codes, scale, format=fmt, dtype=dtype(query))
        out = emit(aten.matmul.default, quantized, _before_qdq(value, shape(query)[1], transpose=False))
        node.replace_all_uses_with(out)


def _before_qdq(operand: Node, heads: int, *, transpose: bool) -> Node:
    """Q/DQ of the tensor behind `operand` with its heads repeated to `heads` and, for K, its last axes swapped."""
    codes = quantize_of(operand)
    emit = Emitter(codes)
    source = codes.args[0]
    assert isinstance(source, Node)
    if shape(source)[1] == heads and not transpose:
        return operand
    if shape(source)[1] != heads:
        source = _repeat_heads(source, heads, emit)
    if transpose:
        source = emit(aten.transpose.int, source, -1, -2)
    new_codes = emit(QUANTIZE, source, codes.args[1], **codes.kwargs)
    return emit(DEQUANTIZE, new_codes, codes.args[1], **operand.kwargs)


def quantize_of(operand: object) -> Node:
    """The quantize that `operand` of a quantized attention is the dequantize of."""
    assert isinstance(operand, Node)
    codes = operand.args[0]
    assert is_call(operand, DEQUANTIZE) and isinstance(codes, Node) and is_call(codes, QUANTIZE), (
        "FuseAttentionQdq takes operands that are a dequantize of a quantize"
    )
    return codes


def _repeat_heads(kv: Node, heads: int, emit: Emitter) -> Node:
    """[B,Hkv,S,D] -> [B,heads,S,D], as unsqueeze, expand and reshape."""
    batch, kv_heads, length, width = emit.sizes(kv)
    groups = heads // shape(kv)[1]
    expanded = emit(aten.expand.default, emit(aten.unsqueeze.default, kv, 2), [batch, kv_heads, groups, length, width])
    return emit(aten.reshape.default, expanded, [batch, heads, length, width])


def _causal_mask(query: Node, key: Node, made: dict[tuple[object, ...], Node], emit: Emitter) -> Node:
    """[Sq,Sk] of 0 on and below the diagonal and a large negative number above, made once for each size."""
    to, rows, columns = dtype(query), shape(query)[2], shape(key)[2]
    size = to, str(rows), str(columns)  # a dynamic length has no hash, but its expression names it
    if size not in made:
        # read off what is quantized: a size of its dequantize would keep that, and K's is replaced
        lengths = [emit(aten.sym_size.int, quantize_of(operand).args[0], 2) for operand in (query, key)]
        q_len, k_len = (s if isinstance(s, int) else n for s, n in zip((rows, columns), lengths, strict=True))
        i = emit(aten.unsqueeze.default, emit(aten.arange.default, q_len), 1)
        j = emit(aten.unsqueeze.default, emit(aten.arange.default, k_len), 0)
        zero = emit(aten.full.default, [], 0.0, dtype=to)
        lowest = emit(aten.full.default, [], torch.finfo(to).min / 2, dtype=to)
        made[size] = emit(aten.where.self, emit(aten.le.Tensor, j, i), zero, lowest)
    return made[size]
