"""The second moments of what weights are multiplied with: layers that read one tensor share one."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.fx import Node

from passes.graph import aten, is_call, shape
from passes.ir import BATCHED_LINEAR
from qcompile.algorithms.base import Operand, Seen, View
from qcompile.algorithms.second_moment import SecondMoment
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import CalibrationError
from qcompile.messages import some

__all__ = ["InputMoments", "expression", "has_input", "tell_few_tokens", "watch_inputs"]

_FEW = 2  # tokens for each feature of a block: with fewer, a second moment describes just them


class ExpertMoment(SecondMoment):
    """The second moments of what the experts of a mixture are multiplied with, kept at the product."""

    def __init__(self, width: int | None, *, double: bool = False) -> None:
        super().__init__(width, grouped=True, double=double)

    def memory(self, node: Node) -> int:
        given = node.args[0]
        assert isinstance(given, Node)
        return self._bytes(shape(node)[0], shape(given)[-1])

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        super().update(args[0], (), weight)


class RoutedMoment(ExpertMoment):
    """The second moments of what the experts of a mixture get, each of its own tokens.

    The graph multiplies every token with every expert, and what an expert was not asked for with zero, later: `Routing`
    sees that. Which of the two comes first in a run is left open.
    """

    def __init__(self, width: int | None, *, double: bool = False) -> None:
        super().__init__(width, double=double)
        self._waiting: tuple[torch.Tensor, float] | None = None
        self._routing: torch.Tensor | None = None

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        self._waiting = args[0].detach(), weight
        self._take()

    def routed(self, routing: torch.Tensor) -> None:
        """`[E, T, 1]`, not zero where an expert is asked."""
        self._routing = routing
        self._take()

    def _take(self) -> None:
        if self._waiting is None or self._routing is None:
            return
        (x, weight), asked = self._waiting, self._routing.detach()[..., 0] != 0
        self._waiting = self._routing = None
        most = int(asked.sum(-1).max()) if asked.numel() else 0
        own = x.new_zeros(asked.shape[0], most, x.shape[-1])  # rows of zeros are no tokens
        for expert, rows in enumerate(asked):
            given = x[expert if x.shape[0] > 1 else 0][rows]
            own[expert, : len(given)] = given
        self.add(own, weight)


class Routing(Statistic):
    """Tells the second moments of experts which tokens are theirs; keeps nothing."""

    def __init__(self, moments: Iterable[RoutedMoment] = ()) -> None:
        self.moments = list(moments)

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        for moment in self.moments:
            moment.routed(result)

    def merge(self, other: Self) -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


def has_input(weight: Operand) -> bool:
    """Whether the weight is multiplied with what a second moment can be kept of: those of convolutions are not."""
    return weight.site.operator.gemm


def watch_inputs(
    weights: Iterable[Operand], width: Callable[[Operand], int | None], *, double: bool = False
) -> dict[Node, Statistic]:
    """What to keep for `weights`, whose blocks on the diagonal are `width` wide; None for the whole second moment."""
    widths: dict[Node, int | None] = {}
    for weight in weights:
        if has_input(weight):
            node, wanted = _kept_at(weight), width(weight)
            known = widths.get(node, wanted)
            widths[node] = None if known is None or wanted is None else math.lcm(known, wanted)
    found: dict[Node, Statistic] = {}
    for node, kept in widths.items():
        if node.target is not BATCHED_LINEAR:
            found[node] = SecondMoment(kept, double=double)
            continue
        routing = _routing(node)
        if routing is None:
            found[node] = ExpertMoment(kept, double=double)
            continue
        moment = found[node] = RoutedMoment(kept, double=double)
        listening = found.setdefault(routing, Routing())
        assert isinstance(listening, Routing)
        listening.moments.append(moment)
    return found


class InputMoments:
    """What was kept for weights; of a weight that several layers multiply with, the sum of what each of them reads."""

    def __init__(self, weights: Iterable[Operand], seen: Seen) -> None:
        self._kept: dict[Hashable, list[SecondMoment]] = {}
        self._keys: dict[Operand, Hashable] = {}
        for weight in weights if seen else ():
            found = seen.get(_kept_at(weight)) if has_input(weight) else None
            if isinstance(found, SecondMoment):
                _check_finite(weight, found)
                key = self._keys[weight] = expression(weight.node)
                known = self._kept.setdefault(key, [])
                if found not in known:
                    known.append(found)

    def key(self, weight: Operand) -> Hashable:
        """The same for weights that are multiplied with the same."""
        return tuple(id(moment) for moment in self._of(weight))

    def tokens(self, weight: Operand) -> torch.Tensor | None:
        """How many there were, `[1]` or `[E]`; None where there was nothing but zeros."""
        found = self._of(weight)
        return torch.stack([moment.tokens for moment in found]).sum(0) if found else None

    def blocks(self, weight: Operand, width: int) -> torch.Tensor | None:
        """As of `SecondMoment`."""
        found = [moment.blocks(width, weight.shape[-1]) for moment in self._of(weight)]
        return sum(block for block in found if block is not None) if found else None  # type: ignore[return-value]

    def _of(self, weight: Operand) -> list[SecondMoment]:
        kept = self._kept.get(self._keys[weight], []) if weight in self._keys else []
        return [moment for moment in kept if moment.sum.high is not None]


def tell_few_tokens(view: View, moments: InputMoments, width: Callable[[Operand], int]) -> None:
    """A notice where second moments, in blocks of some `width`, are of few tokens."""
    found = {}
    for weight in view.weights:
        tokens, wanted = moments.tokens(weight), _FEW * width(weight)
        if tokens is not None and float(tokens.min()) < wanted:
            experts = tokens.numel()
            part = f"{int((tokens < wanted).sum())} of {experts} experts, " if experts > 1 else ""
            found[weight.name] = f"{part}{float(tokens.min()):.0f} and not {wanted}"
    if found:
        told = some([f"{name} ({what})" for name, what in found.items()])
        view.notices.append(f"calibration has so few tokens that weights may be fitted to these: {told}")


def _check_finite(weight: Operand, found: SecondMoment) -> None:
    if found.broken:
        raise CalibrationError(
            f"{weight.name}: calibration found NaN or infinity in {_kept_at(weight).name}, which the layer reads, in"
            f" {found.broken} of {found.runs} runs{found.first_lost}"
        )


def expression(node: Node) -> Hashable:
    """What a weight is made of, the same for one that is read in several places."""
    if node.op == "get_attr":
        return id(node.graph.owning_module), str(node.target)
    parts = tuple(expression(arg) if isinstance(arg, Node) else repr(arg) for arg in node.args)
    return str(node.target), parts, repr(node.kwargs)


def _kept_at(weight: Operand) -> Node:
    """What is watched for a weight: the tensor that its layer reads, or a product with experts, which has two sizes."""
    consumer = weight.site.consumer
    if consumer.target is BATCHED_LINEAR:
        return consumer
    source = consumer.args[0]
    assert isinstance(source, Node)
    return source


def _routing(product: Node) -> Node | None:
    """`[E, T, 1]`, what the results of experts are multiplied with in the end; None where that is not found."""
    experts, pending, known = shape(product)[0], list(product.users), set()
    while pending:
        node = pending.pop(0)
        value = node.meta.get("val")
        if node in known or not isinstance(value, torch.Tensor) or value.ndim != 3 or value.shape[0] != experts:
            continue
        known.add(node)
        for factor in node.all_input_nodes if is_call(node, aten.mul.Tensor) else ():
            sizes = shape(factor)
            if len(sizes) == 3 and (sizes[0], sizes[2]) == (experts, 1):
                return factor
        pending += node.users
    return None
