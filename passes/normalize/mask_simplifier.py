"""What an attention mask computes, and the fewest operators that compute it.

Used by `NormalizeAttentionMask`, which decides; here is how. A mask is read as a conjunction of conditions: "key j is
visible to query i". Conditions that always hold go, expansions go (attention broadcasts), lookups by ranges become
unsqueezes, and an additive mask of zeros and very negative numbers becomes the condition under which it is zero.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.constants import scalar
from passes.graph import Emitter, argument, aten, dtype, is_call, shape
from passes.normalize.size_functions import NotEvaluable, SizeFunctions
from passes.sdpa import HIDDEN

__all__ = ["SimplerMasks", "unexpanded"]

_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_Conditions = list[tuple[Node, bool]]  # boolean nodes, and whether each has to be negated


def unexpanded(mask: Node) -> Node:
    """`mask` before it was expanded to the full shape; attention broadcasts it."""
    while is_call(mask, aten.expand.default, aten.clone.default) and len(shape(mask)) == len(shape(mask.args[0])):  # type: ignore[arg-type]
        mask = mask.args[0]  # type: ignore[assignment]
    return mask


class SimplerMasks:
    """The masks of one graph, each worked out once and shared by all attentions that use it."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.functions = SizeFunctions(gm)
        self._kinds: dict[Node, str] = {}
        self._simplest: dict[Node, Node | None] = {}

    def simplest(self, mask: Node) -> Node | None:
        """An equivalent of `mask` of the fewest operators: boolean if that is possible, None if it hides nothing."""
        if mask not in self._simplest:
            conditions = [(mask, False)] if dtype(mask) is torch.bool else self._conditions(mask)
            self._simplest[mask] = unexpanded(mask) if conditions is None else self._all_of(conditions, mask)
        return self._simplest[mask]

    def kind(self, mask: Node) -> str:
        """What the size function `mask` is: "true" (hides nothing), "causal" (for every head), "pattern" or "bias".

        Raises:
            NotEvaluable: it cannot be computed at the sizes that would tell.
        """
        if mask not in self._kinds:
            self._kinds[mask] = self._kind(mask)
        return self._kinds[mask]

    def _kind(self, mask: Node) -> str:
        possible = {"true": _is_all_true, "causal": _is_causal}
        for _, value in self.functions.samples(mask):
            visible = _visible(value)
            if visible is None:
                return "bias"
            possible = {kind: holds for kind, holds in possible.items() if holds(visible)}
            if not possible:
                return "pattern"
        return next(iter(possible))

    def _always_holds(self, condition: Node) -> bool:
        if not self.functions.is_size_function(condition):
            return False
        try:
            return self.kind(condition) == "true"
        except NotEvaluable:  # not known to hold; the pass reports masks of which this is all there is
            return False

    def _all_of(self, conditions: _Conditions, mask: Node) -> Node | None:
        """The conjunction of `conditions`, written before `mask`; None if all of them always hold."""
        emit = Emitter(before=mask)
        result: Node | None = None
        for condition, negated in conditions:
            simple: Node | None = condition
            if negated:
                simple = emit(aten.logical_not.default, unexpanded(condition))
            else:
                simple = self._simplify(condition, emit)
            if result is None or simple is None:
                result = result if simple is None else simple
            else:
                result = emit(aten.__and__.Tensor, result, simple)
        return result

    def _simplify(self, node: Node, emit: Emitter) -> Node | None:
        """The boolean `node` up to broadcasting, in fewest operators; None if it is always true."""
        node = unexpanded(node)
        if self._always_holds(node):
            return None
        if is_call(node, *_AND):
            sides = [self._simplify(side, emit) for side in node.all_input_nodes]
            kept = [side for side in sides if side is not None]
            if len(kept) < 2:
                return kept[0] if kept else None
            return node if kept == node.all_input_nodes else emit(aten.__and__.Tensor, *kept)
        if is_call(node, aten.index.Tensor):
            return self._unindexed(node, emit)
        return node

    def _unindexed(self, node: Node, emit: Emitter) -> Node:
        """`x[arange(a)[:, None, None, None], arange(b)]` as `x[:, None, None, :]`; `node` if it is anything else.

        Where it is not known that the range is as long as the axis, the rows are picked by a one-dimensional range.
        """
        x, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        if not isinstance(x, Node) or len(indices) != len(shape(x)) or not all(isinstance(i, Node) for i in indices):
            return node
        rank = len(shape(node))
        places: list[int] = []
        for axis, index in enumerate(indices):
            place = _place(index, rank)
            if place == rank and statically_known_true(shape(x)[axis] == 1):  # any place will do
                place = places[-1] + 1 if places else 0
            places.append(place)
        in_order = all(a < b for a, b in itertools.pairwise(places))
        if not in_order or not all(p < rank and self._is_range(i) for p, i in zip(places, indices, strict=True)):
            return node
        for axis, (index, place) in enumerate(zip(indices, places, strict=True)):
            if not statically_known_true(shape(node)[place] == shape(x)[axis]):
                x = emit(aten.index_select.default, x, axis, emit(aten.reshape.default, index, [-1]))
        for place in range(rank):
            if place not in places:
                x = emit(aten.unsqueeze.default, x, place)
        return x

    def _is_range(self, index: Node) -> bool:
        """Whether `index` is 0, 1, 2 ... along its one axis, whatever its length."""
        if not self.functions.is_size_function(index):
            return False
        try:
            return all(torch.equal(v.flatten(), torch.arange(v.numel())) for _, v in self.functions.samples(index))
        except NotEvaluable:
            return False

    def _conditions(self, mask: Node) -> _Conditions | None:
        """Conditions that say where the additive `mask` is zero; None if it is not very negative everywhere else."""
        if is_call(mask, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
            condition, chosen, other = mask.args
            for value, rest, negated in ((other, chosen, False), (chosen, other, True)):
                number = scalar(self.gm, value)
                if number is not None and number <= HIDDEN:
                    return self._and_conditions(rest, (condition, negated))  # type: ignore[arg-type]
        elif is_call(mask, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            base, condition, value = mask.args
            filled = scalar(self.gm, value)
            if filled is not None and filled <= HIDDEN:
                return self._and_conditions(base, (condition, True))  # type: ignore[arg-type]
        elif is_call(mask, aten.add.Tensor) and argument(mask, "alpha") == 1 and len(mask.all_input_nodes) == 2:
            left, right = (self._conditions(side) for side in mask.all_input_nodes)
            return None if left is None or right is None else [*left, *right]
        elif unexpanded(mask) is not mask:
            return self._conditions(unexpanded(mask))
        elif is_call(mask, aten.clamp.default) and mask.args[1] <= HIDDEN and mask.args[2] >= 0:  # type: ignore[operator]
            return self._conditions(mask.args[0])  # type: ignore[arg-type]  # as `NormalizeAttention` narrows it
        elif is_call(mask, aten._to_copy.default) and dtype(mask).is_floating_point:
            return self._conditions(mask.args[0])  # type: ignore[arg-type]
        return None

    def _and_conditions(self, base: object, condition: tuple[Node, bool]) -> _Conditions | None:
        """Conditions of an additive mask that is `base` where `condition` holds and hides elsewhere."""
        if scalar(self.gm, base) == 0:
            return [condition]
        rest = self._conditions(base) if isinstance(base, Node) else None
        return None if rest is None else [*rest, condition]


def _place(index: Node, rank: int) -> int:
    """The axis of a result of `rank` axes that `index` varies along; `rank` if that is not exactly one."""
    longer = [axis for axis, size in enumerate(shape(index)) if not statically_known_true(size == 1)]
    return longer[0] + rank - len(shape(index)) if len(longer) == 1 else rank


def _visible(value: torch.Tensor) -> torch.Tensor | None:
    """Where a mask lets through; None for an additive mask with values besides zero and very negative ones."""
    if value.dtype is torch.bool:
        return value
    zero = value == 0
    return zero if bool((zero | (value <= HIDDEN)).all()) else None


def _is_all_true(visible: torch.Tensor) -> bool:
    return bool(visible.all())


def _is_causal(visible: torch.Tensor) -> bool:
    if visible.ndim < 2 or visible.shape[-1] != visible.shape[-2]:
        return False
    return bool((visible == torch.ones(visible.shape[-2:], dtype=torch.bool).tril()).all())
