"""The channels of what linear layers read are scaled down, and the columns of their weights up."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.absorb import Absorber, find_absorber, norm_operands
from passes.base import Pass
from passes.constants import add_constant, evaluate_constant, is_constant_expression, replace_with_constant
from passes.graph import Emitter, aten, dtype, following, is_call, val
from passes.hadamard import HADAMARD
from passes.quantize.sites import linear_name

__all__ = ["EDITED", "FACTOR", "SMOOTHED", "SmoothLinears", "Smoothing", "is_factor", "unfit"]

FACTOR = "pre_quant_scale"
"""What the names of factors that stay in the graph end with; Model Optimizer has the name."""

EDITED, SMOOTHED = "edited", "smoothed"  # keys in `meta["custom"]`, which a saved program keeps


@dataclass(frozen=True)
class Smoothing:
    """What to do with the linear layers that read one tensor.

    Attributes:
        linears: calls of `aten.linear`, all of one input `[..., K]`; also such as will not be quantized, so that
            everything that reads it agrees.
        factor: `[K]`, float32, positive: what the input is multiplied by. Columns of weights are divided by it.
    """

    linears: tuple[Node, ...]
    factor: torch.Tensor


class SmoothLinears(Pass):
    """Multiply the channels of an input by a factor, and divide the columns of the weights that it meets by it.

    Before:
        y = linear(layer_norm(x, [K], g, b), w, c)                      # w [N, K]
        z = linear(relu(linear(x, w1, b1)), w2, c)
        v = linear(x, wv); o = linear(reshape(transpose(attention(q, k, heads(v)))), wo)
        t = linear(gelu(x), w, c)
    After, with a factor f [K] for the input of each (1 / f is called s in the papers):
        y = linear(layer_norm(x, [K], g * f, b * f), w / f, c)
        z = linear(relu(linear(x, w1 * f[:, None], b1 * f)), w2 / f, c)
        v = linear(x, wv * f[:, None]); o = linear(..., wo / f)         # grouped queries: f is that of the kv heads
        t = linear(mul(gelu(x), f), w / f, c)

    Requires: weights as constant expressions; nothing is quantized yet.
    Ensures: the same products, within rounding. Readers of the tensor that are not among the layers, and other readers
        of a weight, a norm's parameter or a bias, have the numbers that they had. Parameters keep their dtypes, and are
        computed in float32. Norms and layers that were changed say so in `meta["custom"]`.
    Declines when: a layer is smoothed or rotated already; a weight is computed; or the input is a constant.
    Why: few channels of activations are large, and one scale for all is theirs; weights have room for them. In the norm
        or the layer before the factor costs nothing; where something else reads the tensor, too, or no such layer makes
        it, it is a multiplication in front of the quantizer, which TensorRT computes in the same kernel.
    """

    def __init__(
        self, smoothings: Sequence[Smoothing] = (), left: Mapping[Node, str] | None = None, told: str = ""
    ) -> None:
        """`left`: layers that were looked at and stay as they are, with the reason. `told`: for the user, of all."""
        super().__init__()
        self.smoothings, self.left, self.told = smoothings, left or {}, told

    def rewrite(self, gm: GraphModule) -> None:
        if self.told:
            self.notice(self.told)
            self.told = ""
        for node, why in self.left.items():
            if node.graph is gm.graph:
                self.decline(why, node)
        for smoothing in self.smoothings:
            first = smoothing.linears[0]
            if first.graph is not gm.graph:
                continue
            if reasons := [reason for linear in smoothing.linears if (reason := unfit(linear))]:
                self.decline(reasons[0], *smoothing.linears)
                continue
            self._smooth(gm, smoothing)
            self.fire()

    def _smooth(self, gm: GraphModule, smoothing: Smoothing) -> None:
        linears, factor = smoothing.linears, smoothing.factor
        x = linears[0].args[0]
        assert isinstance(x, Node) and all(linear.args[0] is x for linear in linears)
        absorber = find_absorber(x, linears)
        if isinstance(absorber, str):
            _multiply(gm, x, linears, factor)
        else:
            _absorb(gm, absorber, factor)
        edited: dict[Node, Node] = {}
        for linear in linears:
            weight = linear.args[1]
            assert isinstance(weight, Node)
            if weight not in edited:
                edited[weight] = _scaled(gm, linear, 1, lambda w: w / factor.to(w.device))
            linear.update_arg(1, edited[weight])
            _mark(linear, SMOOTHED)


def is_factor(name: str) -> bool:
    """Whether a constant called `name` is a factor that stayed in the graph."""
    return re.search(rf"(^|\.){FACTOR}(_\d+)?$", name) is not None


def unfit(linear: Node) -> str | None:
    """Why the input of a linear layer cannot be smoothed, or None."""
    x, weight = linear.args[:2]
    if linear.meta.get("custom", {}).get(SMOOTHED):
        return "its input is smoothed already"
    if not isinstance(weight, Node) or not is_constant_expression(weight):
        return "its weight is computed when the model runs"
    if any(is_call(node, HADAMARD) for node in (weight, *weight.all_input_nodes)):
        return "it is rotated, which spreads large channels"
    return "its input is a constant" if is_constant_expression(x) else None


def _absorb(gm: GraphModule, absorber: Absorber, factor: torch.Tensor) -> None:
    node, own = absorber.node, factor
    if absorber.repeats > 1:
        own = factor.view(-1, absorber.repeats, absorber.width)[:, 0].flatten()
    if absorber.is_norm:
        for index in norm_operands(node):
            node.update_arg(index, _scaled(gm, node, index, lambda p: p * own.to(p.device)))
    else:
        node.update_arg(1, _scaled(gm, node, 1, lambda w: w * own.to(w.device)[:, None]))
        if len(node.args) > 2 and isinstance(node.args[2], Node):
            node.update_arg(2, _scaled(gm, node, 2, lambda b: b * own.to(b.device)))
    _mark(node, EDITED)


def _multiply(gm: GraphModule, x: Node, linears: Sequence[Node], factor: torch.Tensor) -> None:
    """`x` times the factor for `linears`, right behind it, so that it stands before all of them."""
    before = following(x)
    emit = Emitter(before, like=linears[0])
    name = f"{linear_name(linears[0])}.{FACTOR}".removeprefix(".")
    stored = add_constant(gm, name, factor.to(val(x).device, dtype(x)), before)
    stored.meta["nn_module_stack"] = emit.like.meta.get("nn_module_stack", {})
    product = emit(aten.mul.Tensor, x, stored)
    for linear in linears:
        linear.update_arg(0, product)


def _scaled(gm: GraphModule, reader: Node, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Node:
    """The constant that `reader` has as an argument, changed in float32, for this reader alone."""
    old = reader.args[index]
    assert isinstance(old, Node)
    value = evaluate_constant(gm, old)
    new = change(value.float()).to(value.dtype).contiguous()
    alone = Emitter(reader)(aten.clone.default, old)
    reader.update_arg(index, alone)
    before = alone.prev
    replace_with_constant(gm, alone, new)
    found = before.next
    assert found.op == "get_attr"
    return found


def _mark(node: Node, key: str) -> None:
    node.meta["custom"] = {**node.meta.get("custom", {}), key: True}
