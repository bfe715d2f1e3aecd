"""Softmax written out becomes softmax."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, only_user, shape
from passes.normalize.attention_layout import is_one, same
from passes.normalize.attention_scores import MATMULS
from passes.sdpa import SOFTMAXES

__all__ = ["NormalizeSoftmax"]


class NormalizeSoftmax(Pass):
    """Rewrite exponentials divided by their sum as `softmax`.

    Before:
        e = exp(x - amax(x, d, True)); y = e / sum(e, d, True)      # or without the maximum, or times a reciprocal
        z = matmul(e, v) / sum(e, -1, True)                         # divided behind the product with the values
        w = exp(log_softmax(x, d)); w = exp(x - logsumexp(x, d, True))
        u = softmax(x - amax(x, d, True), d)                        # which a softmax does by itself
    After:
        y = softmax(x, d)
        z = matmul(softmax(x, -1), v)

    Requires: `RemoveNoOps` ran.
    Ensures: the same values up to rounding, and finite ones where the exponentials alone would be infinite.
    Declines when: never; what is subtracted varies along the axis, the sum has another summand, or the exponentials
        another user, then it is no softmax.
    Why: an attention is found by its softmax, and back ends have a kernel for that.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.exp.default):
            if self._normalized(node) or self._divided(node):
                self.fire()
        for node in calls(gm.graph, *SOFTMAXES):
            shifted, axis = node.args[:2]
            rank = len(shape(node))
            x = _without_constant(node, axis % rank) if rank else shifted  # type: ignore[operator, arg-type]
            if x is not shifted:
                node.replace_input_with(shifted, x)  # type: ignore[arg-type]
                self.fire()

    def _normalized(self, exp: Node) -> bool:
        """Rewrite `exp` of a logarithm of probabilities."""
        source = exp.args[0]
        if is_call(source, aten.log_softmax.int, aten._log_softmax.default):
            x, axis = source.args[:2]  # type: ignore[union-attr]
        elif is_call(source, aten.sub.Tensor) and is_call(source.args[1], aten.logsumexp.default):  # type: ignore[union-attr]
            x, total = source.args[:2]  # type: ignore[union-attr]
            axes = argument(total, "dim")  # type: ignore[arg-type]
            if total.args[0] is not x or not argument(total, "keepdim") or len(axes) != 1:  # type: ignore[union-attr, arg-type]
                return False
            axis = axes[0]
        else:
            return False
        if not isinstance(x, Node) or not _is_plain(source) or dtype(x) != dtype(exp):
            return False
        exp.replace_all_uses_with(Emitter(exp)(aten.softmax.int, x, axis))
        return True

    def _divided(self, exp: Node) -> bool:
        """Rewrite the division of `exp` by its sum."""
        total = next((user for user in exp.users if _is_sum(user)), None)
        others = [user for user in exp.users if user is not total]
        if total is None or len(others) != 1 or dtype(total) != dtype(exp):
            return False
        axis = argument(total, "dim")[0] % len(shape(exp))
        (weighted,) = others
        if is_call(weighted, *MATMULS) and weighted.args[0] is exp and weighted.args[1] is not exp:
            quotient = _quotient(weighted, total)
            if axis != len(shape(exp)) - 1 or quotient is None or only_user(weighted) is not quotient:
                return False
            if not same(shape(quotient), shape(weighted)):  # the values are a vector
                return False
            softmax = Emitter(weighted, like=exp)(aten.softmax.int, _without_constant(exp, axis), axis)
            weighted.replace_input_with(exp, softmax)
            quotient.replace_all_uses_with(weighted)
            return True
        if (quotient := _quotient(exp, total)) is None:
            return False
        softmax = Emitter(quotient, like=exp)(aten.softmax.int, _without_constant(exp, axis), axis)
        quotient.replace_all_uses_with(softmax)
        return True


def _is_plain(node: object) -> bool:
    """Whether `node` subtracts without a factor."""
    return isinstance(node, Node) and bool(node.kwargs.get("alpha", 1) == 1)


def _is_sum(node: Node) -> bool:
    if not is_call(node, aten.sum.dim_IntList):
        return False
    axes = argument(node, "dim")
    return isinstance(axes, (list, tuple)) and len(axes) == 1 and bool(argument(node, "keepdim")) and bool(shape(node))


def _quotient(node: Node, total: Node) -> Node | None:
    """What divides `node` by `total`, which nothing else reads."""
    user = only_user(total)
    if is_call(user, aten.div.Tensor) and user.args == (node, total):  # type: ignore[union-attr]
        return user
    if not is_call(user, aten.reciprocal.default):
        return None
    assert user is not None
    product = only_user(user)
    return product if is_call(product, aten.mul.Tensor) and {*product.args} == {node, user} else None  # type: ignore[union-attr]


def _without_constant(node: Node, axis: int) -> Node:
    """What `node`, an exp or a softmax, is of, without a number for each row that is subtracted first: the
    probabilities are the same."""
    source = node.args[0]
    assert isinstance(source, Node)
    if not is_call(source, aten.sub.Tensor) or not _is_plain(source):
        return source
    x, constant = source.args[:2]
    if not isinstance(x, Node) or not isinstance(constant, Node) or dtype(x) != dtype(source):
        return source
    sizes = [1] * (len(shape(x)) - len(shape(constant))) + list(shape(constant))
    return x if bool(same(shape(x), shape(source))) and is_one(sizes[axis]) else source
