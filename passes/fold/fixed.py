"""What no user input reaches is computed once."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.dependence import value_operands
from passes.evaluation import computable_nodes, evaluate
from passes.graph import aten, is_call, name_in_module, shape, val
from passes.ir import ATTENTION, BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.sdpa import SDPA

__all__ = ["FoldFixed"]

MAX_BYTES = 256 << 20  # of one result
_PRODUCTS = (
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default),
    *(aten.baddbmm.default, aten.convolution.default),
    *(SDPA, ATTENTION, BATCHED_LINEAR),
)


class FoldFixed(Pass):
    """Store the products, and the codes of activations, that are the same at every call.

    Before, learned queries (DETR, Perceiver), and a table of positions that goes through an MLP (Swin v2):
        q = linear(layer_norm(queries), w)
        y = attention(dequantize(quantize(q, s), s), k, v)
        z = add(x, linear(relu(linear(grid, w1)), w2))
    After:
        y = attention(dequantize(codes, s), k, v)
        z = add(x, constant)

    Requires: what rearranges the operands of attentions ran.
    Ensures: bit-equal values, made by the operators of the graph; of a weight the codes stay, and its dequantize. What
        is no product and is not quantized (a table that is looked up, a mask) stays as it is.
    Declines when: a result takes more than 256 MB; without a note where a size is dynamic, as there is nothing to store
        then: what is expanded to it is.
    Why: TensorRT-RTX 1.7.1 multiplies constants at every call, and does not fuse an FP8 attention whose keys and values
        are made so; where their codes, or those of the queries, are stored, it does.
    """

    def rewrite(self, gm: GraphModule) -> None:
        computable = computable_nodes(gm)
        worth, read = _worth_storing(computable), set[Node]()
        kept = []
        for node in reversed(computable):
            if all(user in computable and user not in read for user in node.users):
                continue  # what is made of it is stored
            if node not in worth:
                read.add(node)
                continue
            if shape(node).numel() * val(node).itemsize > MAX_BYTES:
                self.decline(f"no input reaches this {list(shape(node))}, which is too large to store", node)
                read.add(node)
            else:
                kept.append(node)
        if not kept:
            return
        for node, value in evaluate(gm, computable, kept).items():
            name = name_in_module(node, "codes" if is_call(node, QUANTIZE) else "constant")
            node.replace_all_uses_with(add_constant(gm, name, value.contiguous(), node))
            self.fire()
        for node in reversed(computable):  # dead code elimination keeps an SDPA, which could draw dropout
            if not node.users:
                gm.graph.erase_node(node)


def _worth_storing(computable: dict[Node, None]) -> dict[Node, None]:
    """Codes, and what is made of products. A weight, and what only arranges or scales it, is neither."""
    weights, products, found = set[Node](), set[Node](), dict[Node, None]()
    for node in computable:
        operands = value_operands(node)
        if is_call(node, *_PRODUCTS):
            products.add(node)
        elif is_call(node, DEQUANTIZE) or not weights.isdisjoint(operands):
            weights.add(node)
            continue
        elif not products.isdisjoint(operands):
            products.add(node)
        is_codes = is_call(node, QUANTIZE) or (
            is_call(node, operator.getitem) and is_call(node.args[0], DYNAMIC_QUANTIZE)
        )
        if (is_codes or node in products) and isinstance(node.meta["val"], torch.Tensor):
            found[node] = None
    return found
