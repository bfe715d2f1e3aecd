"""Every way to write a linear layer becomes `aten.linear`."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, dtype, is_call, is_constant_expression, only_user, shape


class NormalizeLinear(Pass):
    """Rewrite matrix products with a constant matrix to `aten.linear`, with the bias that is added to them.

    Before:
        y = addmm(bias, x, w)          # GPT-2's Conv1D; `mm` and `matmul` the same
        y = add(matmul(x, w), bias)
    After:
        y = linear(x, transpose(w), bias)

    Requires: graph of `unlift`, with weights as `get_attr`.
    Ensures: the same product; the transpose is of a constant and is folded with it.
    Declines when: never; a product of two activations is not a linear layer.
    Why: quantizers, merging and lowering then know one form only.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.addmm.default, aten.mm.default, aten.matmul.default):
            if node.target is aten.addmm.default:
                if node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1:
                    bias, x, weight = node.args
                    self._replace(node, x, weight, bias if _is_bias(bias, weight) else None, add=bias)
            else:
                x, weight = node.args
                self._replace_product(node, x, weight)

    def _replace_product(self, node: Node, x: Node, weight: Node) -> None:
        add = only_user(node)
        if is_call(add, aten.add.Tensor) and add is not None and add.kwargs.get("alpha", 1) == 1:
            bias = add.args[1] if add.args[0] is node else add.args[0]
            if _is_bias(bias, weight):
                self._replace(add, x, weight, bias)
                return
        self._replace(node, x, weight, None)

    def _replace(self, node: Node, x: object, weight: object, bias: object, add: object = None) -> None:
        if not (isinstance(x, Node) and isinstance(weight, Node) and is_constant_expression(weight)):
            return
        if is_constant_expression(x) or len(shape(weight)) != 2:
            return
        emit = Emitter(node)
        result = emit(aten.linear.default, x, _transpose(emit, weight), *([bias] if bias is not None else []))
        if add is not None and bias is None:
            result = emit(aten.add.Tensor, result, add)
        node.replace_all_uses_with(result)
        self.fire()


def _transpose(emit: Emitter, weight: Node) -> Node:
    """`weight` transposed; undoes the transpose that it came through, if any."""
    if is_call(weight, aten.t.default):
        return weight.args[0]  # type: ignore[return-value]
    if is_call(weight, aten.transpose.int) and weight.args[1] != weight.args[2]:
        return weight.args[0]  # type: ignore[return-value]
    if is_call(weight, aten.permute.default) and weight.args[1] in ([1, 0], [-1, 0], [1, -2], [-1, -2]):
        return weight.args[0]  # type: ignore[return-value]
    return emit(aten.transpose.int, weight, 0, 1)


def _is_bias(bias: object, weight: Node) -> bool:
    return (
        isinstance(bias, Node)
        and is_constant_expression(bias)
        and len(shape(bias)) == 1
        and shape(bias)[0] == shape(weight)[-1]
        and dtype(bias) == dtype(weight)
    )
