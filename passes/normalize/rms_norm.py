"""RMS normalization written out in elementary operators becomes one node."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.constants import scalar
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, only_user, shape

__all__ = ["NormalizeRmsNorm"]


class NormalizeRmsNorm(Pass):
    """Rewrite `x / sqrt(mean(x^2) + eps) * weight` as `rms_norm`.

    Before:
        f = to(x, fp32)
        n = f * rsqrt(mean(pow(f, 2), [-1], keepdim=True) + eps)  # or f / sqrt(...), mul(f, f), pow(..., -0.5)
        y = weight * to(n, fp16)                                  # Llama, T5; Gemma: to(n * (1 + weight), fp16)
    After:
        y = rms_norm(x, [N], weight, eps)                         # Gemma: to(rms_norm(f, [N], 1 + weight, eps), fp16)

    Requires: `RemoveNoOps` ran.
    Ensures: the same values, up to one rounding to the dtype of x where the weight is multiplied after the cast.
    Declines when: eps is not a constant number; the weight's dtype is neither that of x nor the one it is computed in,
        or the normalized value has another user (then the weight stays a multiplication of its own).
    Why: a back end has a kernel for it, and placing quantizers needs to see where a normalization ends.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.mul.Tensor, aten.div.Tensor):
            wide, mean_plus_eps = _normalized(node)
            if wide is None or mean_plus_eps is None:
                continue
            mean, eps = _eps(gm, mean_plus_eps)
            if mean is None or not _is_mean_square(mean, _narrow(wide)):
                continue
            if eps is None:
                self.decline("the number added to the mean square is not a constant", node)
                continue
            self._replace(node, wide, eps)

    def _replace(self, node: Node, wide: Node, eps: float) -> None:
        """Put rms_norm in the place of `node`, and of the multiplication with a weight that follows it."""
        width = shape(node)[-1]
        if dtype(wide) is not dtype(node):  # T5 multiplies x with an fp32 factor, which promotes it
            wide = Emitter(node)(aten._to_copy.default, wide, dtype=dtype(node))
        end, weight = _weighted(node)
        source = wide
        if weight is not None:
            narrow = _narrow(wide)
            same = dtype(weight) is dtype(end)
            if same and dtype(narrow) is dtype(end):
                source = narrow
            elif not same or dtype(wide) is not dtype(end):
                self.decline(f"the weight is {dtype(weight)}, and x {dtype(narrow)}: it stays a multiplication", node)
                weight = None
        if weight is None:
            end = node
        new = Emitter(before=end, like=node)(aten.rms_norm.default, source, [width], weight, eps)
        end.replace_all_uses_with(new)
        self.fire()


def _normalized(node: Node) -> tuple[Node | None, Node | None]:
    """x and `mean(x^2) + eps`, if `node` may be the product of the one and the other's inverse square root."""
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None, None
    if is_call(node, aten.div.Tensor):
        is_root = is_call(right, aten.sqrt.default) or (is_call(right, aten.pow.Tensor_Scalar) and right.args[1] == 0.5)
        return (left, right.args[0]) if is_root else (None, None)  # type: ignore[return-value]
    for x, inverse in ((left, right), (right, left)):
        power = is_call(inverse, aten.pow.Tensor_Scalar) and inverse.args[1] == -0.5
        if power or is_call(inverse, aten.rsqrt.default):
            return x, inverse.args[0]  # type: ignore[return-value]
    return None, None


def _eps(gm: GraphModule, node: Node) -> tuple[Node | None, float | None]:
    """The mean in `mean + eps`, and eps if it is a constant."""
    if is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1:
        for mean, eps in (node.args[:2], node.args[1::-1]):
            if is_call(mean, aten.mean.dim):
                return mean, scalar(gm, eps)  # type: ignore[return-value]
    return None, None


def _is_mean_square(node: Node, x: Node) -> bool:
    """Whether `node` is the mean of the squares of `x` along the last axis, which has a static length."""
    square, axes = node.args[0], argument(node, "dim")
    last = len(shape(x)) - 1
    if axes not in ([-1], [last]) or not argument(node, "keepdim"):
        return False
    if not isinstance(shape(x)[-1], int) or not isinstance(square, Node):
        return False
    factors: Sequence[object] = ()
    if is_call(square, aten.pow.Tensor_Scalar):
        factors = square.args[:1] if square.args[1] == 2 else ()
    elif is_call(square, aten.mul.Tensor):
        factors = square.args
    return len(factors) > 0 and all(isinstance(f, Node) and _narrow(f) is x for f in factors)


def _narrow(node: Node) -> Node:
    """`node` before it was cast to a wider type."""
    source = node.args[0] if is_call(node, aten._to_copy.default) else None
    if not isinstance(source, Node) or not dtype(source).is_floating_point:
        return node
    return source if dtype(source).itemsize < dtype(node).itemsize else node


def _weighted(node: Node) -> tuple[Node, Node | None]:
    """The product of the normalized `node` and a weight per channel, behind a cast or not, and that weight."""
    end = only_user(node)
    operand = node
    if is_call(end, aten._to_copy.default) and end is not None and dtype(end).is_floating_point:
        operand, end = end, only_user(end)
    if end is None or not is_call(end, aten.mul.Tensor):
        return node, None
    weight = end.args[1] if end.args[0] is operand else end.args[0]
    width = shape(node)[-1]
    is_weight = isinstance(weight, Node) and weight is not operand and len(shape(weight)) == 1
    if not is_weight or not statically_known_true(shape(weight)[0] == width):  # type: ignore[arg-type]
        return node, None
    return end, weight  # type: ignore[return-value]
