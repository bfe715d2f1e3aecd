"""Every way to write a linear layer becomes `aten.linear`."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, dtype, is_call, only_user, shape, swaps_last_two


class NormalizeLinear(Pass):
    """Rewrite matrix products with a constant matrix to `aten.linear`, with the bias that is added to them.

    Before:
        y = addmm(bias, x, w)          # GPT-2's Conv1D; `mm` and `matmul` the same
        y = add(matmul(x, w), bias)
        z = matmul(w, transpose(x))    # Mamba's dt_proj
    After:
        y = linear(x, transpose(w), bias)
        z = transpose(linear(x, w))

    Requires: graph of `unlift`, with weights as `get_attr`.
    Ensures: the same product; the transpose is of a constant and is folded with it.
    Declines when: the product is scaled (`alpha`, `beta`), or the weight has batches. A product of two activations is
        not looked at.
    Why: quantizers, merging and lowering then know one form only.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.addmm.default, aten.mm.default, aten.matmul.default):
            *added, x, weight = node.args
            if is_call(node, aten.mm.default, aten.matmul.default) and _is_matrix_times(x, weight):
                self._rewrite_columns(node, weight, x)  # type: ignore[arg-type]  # both are nodes
                self.fire()
                continue
            if not isinstance(x, Node) or not isinstance(weight, Node) or not is_constant_expression(weight):
                continue
            if is_constant_expression(x):
                continue
            if len(shape(weight)) != 2:
                self.decline("a product with a batch of constant matrices is not a linear layer", node)
            elif node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                self.decline("the product or the bias is multiplied by a number", node)
            else:
                self._rewrite(node, x, weight, added[0] if added else None)
                self.fire()

    def _rewrite_columns(self, node: Node, columns: Node, weight: Node) -> None:
        """`matmul(weight, columns)` as the linear layer of the rows that `columns` `[..., K, S]` are transposed."""
        emit = Emitter(node)
        rows = columns.args[0] if swaps_last_two(columns) else emit(aten.transpose.int, columns, -1, -2)
        node.replace_all_uses_with(emit(aten.transpose.int, emit(aten.linear.default, rows, weight), -1, -2))

    def _rewrite(self, node: Node, x: Node, weight: Node, added: object) -> None:
        replaced, bias = node, added
        add = only_user(node)
        if added is None and add is not None and is_call(add, aten.add.Tensor) and add.kwargs.get("alpha", 1) == 1:
            other = add.args[1] if add.args[0] is node else add.args[0]
            if _is_bias(other, weight):
                replaced, bias = add, other
        emit = Emitter(replaced, like=node)
        operands = [x, _transpose(emit, weight)]
        if bias is None or _is_bias(bias, weight):
            result = emit(aten.linear.default, *operands, *([] if bias is None else [bias]))
        else:  # addmm takes anything that broadcasts
            result = emit(aten.add.Tensor, emit(aten.linear.default, *operands), bias)
        replaced.replace_all_uses_with(result)


def _is_matrix_times(weight: object, columns: object) -> bool:
    """Whether these are a constant matrix and columns that it multiplies."""
    if not isinstance(columns, Node) or is_constant_expression(columns) or len(shape(columns)) < 2:
        return False
    return is_constant_expression(weight) and len(shape(weight)) == 2  # type: ignore[arg-type]  # it is a node


def transposed(weight: object) -> Node | None:
    """The matrix that `weight` is the transpose of; None if it is the result of no such call."""
    if not isinstance(weight, Node):
        return None
    swaps = is_call(weight, aten.transpose.int) and weight.args[1] != weight.args[2]
    orders = ([1, 0], [-1, 0], [1, -2], [-1, -2])
    if swaps or is_call(weight, aten.t.default) or (is_call(weight, aten.permute.default) and weight.args[1] in orders):
        return weight.args[0]  # type: ignore[return-value]  # it is a node
    return None


def _transpose(emit: Emitter, weight: Node) -> Node:
    """`weight` transposed; undoes the transpose that it came through, if any."""
    return transposed(weight) or emit(aten.transpose.int, weight, 0, 1)


def _is_bias(bias: object, weight: Node) -> bool:
    return (
        isinstance(bias, Node)
        and is_constant_expression(bias)
        and len(shape(bias)) == 1
        and shape(bias)[0] == shape(weight)[-1]
        and dtype(bias) == dtype(weight)
    )
