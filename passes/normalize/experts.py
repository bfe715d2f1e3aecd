"""Every way to multiply with a batch of constant matrices becomes `qcompile::batched_linear`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, argument, aten, calls, shape
from passes.ir import BATCHED_LINEAR


class NormalizeExperts(Pass):
    """Rewrite products of activations with a constant `[E, K, N]` to the linear layers of E experts.

    Before:
        y = bmm(x[E,M,K], w[E,K,N])                 # baddbmm, matmul and einsum the same, the weight on either side
        z = einsum("td,edf->tef", x[T,D], w)
    After:
        y = batched_linear(x, transpose(w))
        z = permute(batched_linear(reshape(x, [1,T,D]), permute(w, [0,2,1])), [1,0,2])

    Requires: graph of `unlift`, with weights as `get_attr`; `ViewsToReshape` ran.
    Ensures: the same sums of products; the permutation of the weight is of a constant and is folded with it.
    Declines when: the product sums over none or several axes of the weight, or over axes of the activations that the
        weight does not have; it takes a diagonal; both other axes of the weight are those of the activations, too; it
        is scaled (`alpha`, `beta`); or an axis of the weight is broadcast.
    Why: quantizers and lowering then know one form only, with the experts first and K last.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *_PRODUCTS):
            product = _read(node)
            if product is None:
                continue
            if reason := product.misfit():
                self.decline(reason, node)
                continue
            product.rewrite()
            self.fire()


_PRODUCTS = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.einsum.default)
_REST = "ABCDEFGH"  # labels of the axes that matmul broadcasts over


@dataclass(frozen=True)
class _Product:
    """`node` as an einsum of activations and a constant with three axes, one label for each axis."""

    node: Node
    x: Node
    weight: Node
    of_x: str
    of_weight: str
    of_result: str

    @property
    def summed(self) -> list[str]:
        return [label for label in self.of_weight if label not in self.of_result]

    @property
    def experts(self) -> str:
        """The label of the experts: the one in all three, or where all experts read one tensor the weight's first."""
        kept = [label for label in self.of_weight if label in self.of_result]
        return next((label for label in kept if label in self.of_x), kept[0])

    def misfit(self) -> str | None:
        """Why this is no batch of linear layers, or None."""
        if self.node.target is aten.baddbmm.default and any(argument(self.node, n) != 1 for n in ("alpha", "beta")):
            return "the product or the bias is multiplied by a number"
        if len(self.summed) != 1 or self.summed[0] not in self.of_x:
            return "this product with a batch of constant matrices does not sum over exactly one axis of them"
        if len({*self.of_weight}) != 3 or any(len({*labels}) != len(labels) for labels in (self.of_x, self.of_result)):
            return "this product with a batch of constant matrices takes a diagonal"
        if any(label not in self.of_result for label in self.of_x if label not in self.of_weight):
            return "this product with a batch of constant matrices also sums over an axis of the activations"
        if sum(label in self.of_x for label in self.of_weight if label in self.of_result) > 1:
            return "this product with a batch of constant matrices has two batch axes in common with the activations"
        sizes = dict(zip(self.of_weight, shape(self.weight), strict=True))
        for label, size in zip(self.of_x, shape(self.x), strict=True):
            if label in sizes and size != sizes[label] and not (size == 1 and label == self.experts):
                return "the batch of constant matrices is broadcast"
        return None

    def rewrite(self) -> None:
        """Replace the node; see the pass."""
        emit = Emitter(self.node)
        experts, (summed,) = self.experts, self.summed
        (features,) = (label for label in self.of_weight if label not in (experts, summed))
        rows = [label for label in self.of_x if label not in (experts, summed)]
        sizes = dict(zip(self.of_x, emit.sizes(self.x), strict=True))
        count, width, depth = (int(shape(self.weight)[self.of_weight.index(n)]) for n in (experts, features, summed))

        own = [experts] if experts in self.of_x else []
        x = _permuted(emit, self.x, self.of_x, [*own, *rows, summed])
        if not own or len(rows) != 1:
            x = emit(aten.reshape.default, x, [sizes.get(experts, 1), -1, depth])
        weight = _permuted(emit, self.weight, self.of_weight, [experts, features, summed])
        result = emit(BATCHED_LINEAR, x, weight)
        if len(rows) != 1:
            result = emit(aten.reshape.default, result, [count, *(sizes[label] for label in rows), width])
        result = _permuted(emit, result, "".join([experts, *rows, features]), list(self.of_result))
        if self.node.target is aten.baddbmm.default:
            result = emit(aten.add.Tensor, result, self.node.args[0])
        self.node.replace_all_uses_with(result)


def _read(node: Node) -> _Product | None:
    """`node` as a product of activations with a constant that has three axes; None if it is anything else."""
    operands = node.args[1] if node.target is aten.einsum.default else node.args[-2:]
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2:
        return None
    left, right = operands
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    on_left, on_right = is_constant_expression(left), is_constant_expression(right)
    labels = _labels(node, len(shape(left)), len(shape(right)))
    if labels is None or on_left == on_right or len(shape(left if on_left else right)) != 3:
        return None
    of_left, of_right, of_result = labels
    if on_right:
        return _Product(node, left, right, of_left, of_right, of_result)
    return _Product(node, right, left, of_right, of_left, of_result)


def _labels(node: Node, left: int, right: int) -> tuple[str, str, str] | None:
    """The product as an einsum of operands with `left` and `right` axes: labels of both and of the result."""
    if node.target is aten.einsum.default:
        match = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]*)", str(node.args[0]).replace(" ", ""))
        return (match[1], match[2], match[3]) if match else None
    if min(left, right) < 2 or max(left, right) > len(_REST) + 2:
        return None
    batch = _REST[: max(left, right) - 2]
    return f"{batch[len(batch) - left + 2 :]}mk", f"{batch[len(batch) - right + 2 :]}kn", f"{batch}mn"


def _permuted(emit: Emitter, tensor: Node, labels: str, order: list[str]) -> Node:
    axes = [labels.index(label) for label in order]
    if axes == sorted(axes):
        return tensor
    if len(axes) == 3 and axes == [0, 2, 1]:
        return emit(aten.transpose.int, tensor, 1, 2)
    return emit(aten.permute.default, tensor, axes)
