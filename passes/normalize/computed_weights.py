"""Weights that a model computes of parameters, or takes out of a larger one, become parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import LAYOUT, constant
from passes.evaluation import computable_nodes, evaluate, needed_for
from passes.graph import argument, aten, calls, is_call, is_pointwise, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.normalize.weight_names import Names, layer_of, piece_of, whole_of
from passes.sdpa import SDPA, SOFTMAXES

__all__ = ["ComputedWeightsToConstants"]

_PRODUCTS = (
    *(aten.mm.default, aten.matmul.default, aten.addmm.default),
    *(aten.bmm.default, aten.baddbmm.default, aten.einsum.default),
)
_REARRANGED = tuple(target for target in LAYOUT if target is not aten.select.int)
_QUANTIZED = (QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE)
# What these make of parameters is no weight: learned queries that a layer projects or normalizes.
_LAYERS = (aten.linear.default, aten.convolution.default, SDPA)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, *SOFTMAXES)


class ComputedWeightsToConstants(Pass):
    """Store the weights and biases that are made of parameters alone.

    Before, cross-attention of `nn.MultiheadAttention`, and a layer under `weight_norm`:
        q, kv = split_with_sizes(in_proj_weight, [64, 128])
        y = linear(x, q); z = linear(m, kv)
        a = linear(x, _weight_norm(v, g))
    After:
        y = linear(x, in_proj.rows_0_64.weight); z = linear(m, in_proj.rows_64_192.weight)
        a = linear(x, weight)

    Requires: graph of `unlift`, with weights as `get_attr`; `ViewsToReshape` and `NormalizeConvolution`
        ran.
    Ensures: bit-equal values. A piece has a name of its own below that of its parameter, and on a CPU its memory if it
        is a matrix; what is computed has the name that its layer would have without. What is made twice is stored once.
    Declines when: never. What a layer or a norm makes of parameters is no weight, nor are learned keys and values. Of
        batches of matrices (experts) pieces alone are taken.
    Why: passes take a constant with one name for a weight, and a part of it, or what is made of two, for an activation.
    """

    def rewrite(self, gm: GraphModule) -> None:
        computable = computable_nodes(gm)
        found: dict[Node, None] = {}
        for node in calls(gm.graph, aten.linear.default, aten.convolution.default, *_PRODUCTS, aten.add.Tensor):
            if node in computable and not is_call(node, *_LAYERS):  # part of a weight itself
                continue
            for operand in _operands(node):
                if operand in computable:
                    found.update(dict.fromkeys(n for n in _sources(operand) if _is_weight(gm, n, node)))
        if not found:
            return
        pieces = {node: piece for node in found if (piece := _piece(gm, node)) is not None}
        values = evaluate(gm, computable, {*found, *pieces.values()})
        called = {node: _called(gm, node, values[pieces[node]] if node in pieces else None) for node in found}
        names = Names(gm, found)
        for node, (layer, leaf) in called.items():
            names.store(node, values[node], layer, leaf)
            self.fire()


def _operands(node: Node) -> Iterator[Node]:
    """What may be the weight or the bias of a linear layer that `node` is, or is the sum of."""
    if is_call(node, aten.add.Tensor):
        terms = [term for term in node.args if isinstance(term, Node)]
        if any(is_call(term, aten.mm.default, aten.matmul.default) for term in terms):
            yield from (term for term in terms if len(shape(term)) == 1)
    elif is_call(node, *_PRODUCTS):
        given = node.args[1] if node.target is aten.einsum.default else node.args
        for operand in given:  # type: ignore[union-attr]
            axes = len(shape(operand)) if isinstance(operand, Node) else 4
            if axes < 3 or (axes == 3 and not _attends(node)):
                yield operand  # type: ignore[misc]
    else:
        yield from (n for name in ("weight", "bias") if isinstance(n := argument(node, name), Node))


def _attends(product: Node) -> bool:
    """Whether a softmax reads `product`, or made what it reads: of an attention whose keys and values are learned."""

    def reaches(step: Callable[[Node], Iterable[Node]]) -> bool:
        pending, seen = [product], {product}
        while pending:
            for node in set(step(pending.pop())) - seen:
                if is_call(node, *SOFTMAXES):
                    return True
                if is_pointwise(node) or is_call(node, *LAYOUT, aten.expand.default, aten.dropout.default):
                    seen.add(node)
                    pending.append(node)
        return False

    return reaches(lambda node: node.users) or reaches(lambda node: node.all_input_nodes)


def _sources(node: Node) -> Iterator[Node]:
    """What is rearranged, or quantized, to `node`: constants alone are nothing to store."""
    if is_call(node, *_REARRANGED):
        for operand in node.all_input_nodes:
            yield from _sources(operand)
    elif is_call(node, DEQUANTIZE):
        codes = node.args[0]
        pair = codes if is_call(codes, QUANTIZE) else codes.args[0] if codes.args else None  # type: ignore[union-attr]
        if is_call(pair, QUANTIZE, DYNAMIC_QUANTIZE):
            yield from _sources(pair.args[0])  # type: ignore[union-attr,arg-type]
    elif node.op != "get_attr":
        yield node


def _is_weight(gm: GraphModule, node: Node, reader: Node) -> bool:
    """Whether `reader` reads `node`, which no input reaches, as a weight or a bias."""
    made_of = needed_for([node])
    roots = [root for n in made_of if (root := constant(gm, n)) is not None]
    if not roots or any(is_call(n, *_LAYERS, *_QUANTIZED) for n in made_of):
        return False
    if not is_call(reader, *_PRODUCTS, aten.add.Tensor):
        return True
    if not any(isinstance(root, torch.nn.Parameter) for root in roots):  # tables of angles and the like are buffers
        return False
    return whole_of(node) is not None or (len(shape(node)) < 3 and not any(is_call(n, *_NORMS) for n in made_of))


def _main_root(gm: GraphModule, node: Node) -> Node:
    """The largest parameter that `node` is made of; a buffer if there is none."""

    def size(root: Node) -> tuple[bool, int, str]:
        tensor = constant(gm, root)
        assert tensor is not None
        return isinstance(tensor, torch.nn.Parameter), tensor.numel(), str(root.target)

    return max((n for n in needed_for([node]) if constant(gm, n) is not None), key=size)


def _called(gm: GraphModule, node: Node, piece: torch.Tensor | None) -> tuple[str, str]:
    """Layer and leaf of what `node` makes, by way of `piece` of its largest parameter or of nothing."""
    root = _main_root(gm, node)
    whole = constant(gm, root)
    assert whole is not None
    layer, leaf = layer_of(str(root.target))
    return layer + ("" if piece is None else piece_of(whole, piece)), leaf


def _piece(gm: GraphModule, node: Node) -> Node | None:
    """The last piece of its largest parameter on the way to `node`."""
    root, made_of = _main_root(gm, node), needed_for([node])
    pieces = [n for n in made_of if isinstance(n.meta["val"], torch.Tensor) and whole_of(n) is root]
    return max(pieces, default=None)  # nodes sort in the order of the graph
