"""Batch norms disappear into the convolution or linear layer beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import (
    delete_constant,
    evaluate_constant,
    is_constant_expression,
    is_read_beside,
    root_constants,
)
from passes.evaluation import computable_nodes, evaluate
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, only_user, shape
from passes.normalize.folded_layer import Affine, FoldedLayer
from passes.normalize.weight_names import Names, layer_of

__all__ = ["NORMS", "Affine", "FoldBatchNorm", "affine_of", "skip_norm"]

NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
_POINTWISE = (aten.mul.Tensor, aten.add.Tensor)
_COMPUTED = "the weight or bias of the layer beside it is computed at run time, or quantized already"


class FoldBatchNorm(Pass):
    """Put a batch norm into the weight and bias of the layer before it, else of those behind it.

    Before:
        y = batch_norm(convolution(x, w, bias), gamma, beta, mean, var)
        z = add(mul(convolution(x, v), factor), shift)        # frozen, as detection models write it: [1, C, 1, 1]
        u = linear(batch_norm(x), w, bias)
    After, with f = gamma / sqrt(var + eps):
        y = convolution(x, w * f, (bias - mean) * f + beta)
        z = convolution(x, v * factor, shift)
        u = linear(x, w * f, bias + w @ (beta - mean * f))

    Requires: `NormalizeConvolution` and `NormalizeLinear` ran.
    Ensures: the same values but for rounding: folds are computed in float64. Weights keep their names; what one layer
        comes to twice is stored once.
    Declines when: the layer before has another reader, and what is behind is none or cannot take it: a convolution that
        pads with zeros, which the norm does not see; a weight is computed at run time or quantized; or what it is
        folded to leaves its dtype. A norm with no such layer beside it is not looked at.
    Why: a quantizer then sees what the network multiplies with, and each norm is a kernel less.
    """

    def __init__(self, *, again: bool = False) -> None:
        """`again`: what is declined was declined before, and is not told a second time."""
        super().__init__()
        self.again = again

    def rewrite(self, gm: GraphModule) -> None:
        folded: dict[Node, FoldedLayer] = {}
        for node in calls(gm.graph, *NORMS):
            if (norm := affine_of(gm, node)) is not None:
                self._fold(gm, node, norm, folded)
        if any(_convolution_of(node) is not None for node in calls(gm.graph, *_POINTWISE)):
            constants = computable_nodes(gm)
            for node in calls(gm.graph, *_POINTWISE):
                source = _convolution_of(node)
                norm = _of_pointwise(gm, node, source, constants) if source is not None else None
                if norm is not None and self._before(gm, source, norm, folded) is None:  # type: ignore[arg-type]
                    _skip(node, source)  # type: ignore[arg-type]
                    self.fire()
        _store(gm, folded)

    def _fold(self, gm: GraphModule, node: Node, norm: Affine, folded: dict[Node, FoldedLayer]) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        results = _results(node)
        reason = self._before(gm, source, norm, folded) if _feeds(source) else ""
        if reason is not None:
            behind = self._behind(gm, results, norm, folded)
            if behind is not None:
                if (told := behind or reason) and not self.again:
                    self.decline(told, node)
                return
        skip_norm(node)
        self.fire()

    def _before(self, gm: GraphModule, layer: Node, norm: Affine, folded: dict[Node, FoldedLayer]) -> str | None:
        """Fold `norm` into `layer`, whose results it reads; why not, or None."""
        if only_user(layer) is None:
            return "the layer before it has another reader, which wants its values as they are"
        known = folded.get(layer) or FoldedLayer.of(gm, layer)
        if known is None:
            return _COMPUTED
        return _keep({layer: known.before(norm)}, folded)

    def _behind(
        self, gm: GraphModule, results: list[Node], norm: Affine, folded: dict[Node, FoldedLayer]
    ) -> str | None:
        """Fold `norm` into every layer that reads it; why not, or None; "" where there is another reader."""
        readers = [user for result in results for user in result.users]
        if not readers or not all(_takes(reader, results) for reader in readers):
            return ""
        found = {}
        for layer in readers:
            if is_call(layer, aten.convolution.default) and any(argument(layer, "padding")) and bool(norm.shift.any()):
                return "the convolution behind it pads with zeros, which the norm does not see"
            known = folded.get(layer) or FoldedLayer.of(gm, layer)
            if known is None:
                return _COMPUTED
            found[layer] = known.behind(norm)
        return _keep(found, folded)


def _keep(found: Mapping[Node, FoldedLayer], folded: dict[Node, FoldedLayer]) -> str | None:
    for node, layer in found.items():
        kind = dtype(argument(node, "weight"))
        if layer.leaves(kind):
            return f"what it is folded to leaves {kind}"
    folded.update(found)
    return None


def _skip(node: Node, source: Node) -> None:
    """`source` in the place of `node`, which it does not count as a reader any more."""
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def skip_norm(norm: Node) -> None:
    """What reads `norm` reads its input, which it does not count as a reader any more."""
    source, results = norm.args[0], _results(norm)
    assert isinstance(source, Node)
    for result in results:
        _skip(result, source)
    if norm not in results:  # nor do the statistics beside them count as readers
        for unread in (*norm.users, norm):
            if not unread.users:
                unread.graph.erase_node(unread)


def _results(norm: Node) -> list[Node]:
    """The normalized tensor: of an operator with several results the first."""
    return [norm] if norm.target is aten.batch_norm.default else [user for user in norm.users if user.args[1] == 0]


def _feeds(layer: Node) -> bool:
    """Whether the channels of what `layer` makes are on axis 1."""
    return is_call(layer, aten.convolution.default) or (is_call(layer, aten.linear.default) and len(shape(layer)) == 2)


def _takes(layer: Node, results: list[Node]) -> bool:
    """Whether `layer` reads one of `results`, whose channels are on axis 1, as its input."""
    if not is_call(layer, aten.convolution.default, aten.linear.default) or layer.args[0] not in results:
        return False
    if is_call(layer, aten.linear.default):
        return len(shape(layer.args[0])) == 2  # type: ignore[arg-type]
    return not argument(layer, "transposed")  # at its edge fewer products are added


def _convolution_of(node: Node) -> Node | None:
    """The convolution that is an operand of `node`."""
    return next((n for n in node.all_input_nodes if is_call(n, aten.convolution.default)), None)


def affine_of(gm: GraphModule, node: Node) -> Affine | None:
    """None for a norm whose numbers are not constant."""
    if node.target is aten.batch_norm.default and argument(node, "training"):
        return None
    operands = [argument(node, name) for name in ("weight", "bias", "running_mean", "running_var")]
    if operands[2] is None or not all(n is None or is_constant_expression(n) for n in operands):
        return None
    weight, bias, mean, var = (None if n is None else evaluate_constant(gm, n).double() for n in operands)
    assert mean is not None and var is not None
    factor = (var + argument(node, "eps")).rsqrt()
    factor = factor if weight is None else factor * weight
    return Affine(factor, -mean * factor if bias is None else bias - mean * factor)


def _of_pointwise(gm: GraphModule, node: Node, source: Node, constants: Mapping[Node, None]) -> Affine | None:
    """What a product or sum of `source` with a constant for each channel does."""
    others = [operand for operand in node.args if operand is not source]
    if node.kwargs or len(others) != 1 or others[0] not in constants:
        return None
    (other,) = others
    assert isinstance(other, Node)
    sizes = [*shape(source)[1:2], *[1] * (len(shape(source)) - 2)]
    if list(shape(other)) not in (sizes, [1, *sizes]) or dtype(other) != dtype(source):
        return None
    values = evaluate(gm, constants, [other])[other].double().flatten()
    if is_call(node, aten.mul.Tensor):
        return Affine(values, torch.zeros_like(values))
    return Affine(torch.ones_like(values), values)


def _store(gm: GraphModule, folded: Mapping[Node, FoldedLayer]) -> None:
    """Give the layers of the graph their new weights and biases."""
    pending: dict[Node, tuple[torch.Tensor, str, str]] = {}
    for node, layer in folded.items():
        emit, weight = Emitter(node), argument(node, "weight")
        path, leaf = layer_of(str(root_constants(weight)[0].target))
        fresh = emit(aten.alias.default, weight), emit(aten.alias.default, argument(node, "bias") or weight)
        node.args = (node.args[0], *fresh, *node.args[3:])
        kind = dtype(weight)
        pending[fresh[0]] = layer.weight(kind), path, leaf
        pending[fresh[1]] = layer.bias.to(kind), path, "bias" if leaf == "weight" else f"{leaf}_bias"
    names = Names(gm, dict.fromkeys(pending))
    for name in {str(root.target) for place in pending for root in root_constants(place)}:
        if not is_read_beside(gm, name, pending.keys()):
            delete_constant(gm, name)
    for place, (value, path, leaf) in pending.items():
        names.store(place, value, path, leaf)
