"""Queries from which a mask hides every key."""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import partial

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import constant
from passes.graph import Emitter, aten, calls, dtype, following, is_call, only_user, place_of, shape, strip
from passes.messages import some
from passes.normalize.size_functions import NotEvaluable, SizeFunctions
from passes.sdpa import HIDDEN_ROUNDED, SDPA, Attention, fully_masked

__all__ = ["ZeroMaskedRows", "masked_attentions"]

_ROWS = (aten.logical_not.default, aten.any.dim, aten.le.Scalar)  # what finds the rows


class ZeroMaskedRows(Pass):
    """Let the result of a query that may see no key be zeros.

    Before:
        y = sdpa(q, k, v, mask)
    After:
        rows = logical_not(any(mask, -1, keepdim=True))     # of logical_not(le(mask, -9984)), if the mask is additive
        y = masked_fill(sdpa(q, k, v, mask), rows, 0)

    Requires: masks are normalized; attention is not fused yet.
    Ensures: zeros for such a query, which is what torch's operator makes of it under a boolean mask, in every dtype and
        by whatever runs the program. That is one meaning for all spellings: the average of all values, which an
        additive finfo.min gives, and the NaN of a softmax over nothing but -inf become zeros, too. Other queries keep
        their values bit for bit. Attentions that share a mask share its reduction.
    Declines when: neither calibration saw such a query nor a mask that no input changes has one, without a note; then
        a kernel would be spent on nothing. What an input hides later is the average of some values there, which ones
        depends on the dtype and on who runs it.
    Why: a mask is added as half of the lowest number, and what is left of a score beside that is decided by how many
        digits a runtime keeps: in float16 one gives the average of all values, another something else.
    """

    def __init__(self, seen: Collection[Node] = ()) -> None:
        """`seen` holds the attentions that had such a query in calibration."""
        super().__init__()
        self.seen = seen

    def rewrite(self, gm: GraphModule) -> None:
        masked = [(node, mask) for node, mask in masked_attentions(gm) if not _is_zeroed(gm, node, mask)]
        if not masked:
            return
        constants = _Constants(gm)
        rows: dict[Node, Node] = {}
        places: dict[str, None] = {}
        for node, mask in masked:
            if node not in self.seen and not constants.hide_all(mask):
                continue
            if mask not in rows:
                rows[mask] = _rows(mask, node)
            zeroed = Emitter(node.next, like=node)(aten.masked_fill.Scalar, node, rows[mask], 0.0)
            node.replace_all_uses_with(zeroed, delete_user_cb=partial(operator.is_not, zeroed))
            places[place_of(node)] = None
            self.fire()
        if places:
            self.notice(
                f"in {some(list(places))} the mask hides every key from some queries: their result is zeros, as torch's"
                " attention gives under a boolean mask, also where the model itself makes it the average of all values"
                " (by adding finfo.min) or NaN; that costs a kernel behind each attention and one for each mask"
            )


def masked_attentions(gm: GraphModule) -> list[tuple[Node, Node]]:
    """The attentions that are not fused and have a mask, in the order of the graph, each with that."""
    found = ((node, Attention.of(node).mask) for node in calls(gm.graph, SDPA))
    return [(node, mask) for node, mask in found if mask is not None]


class _Constants:
    """What masks hide that no user input changes, worked out once for each."""

    def __init__(self, gm: GraphModule) -> None:
        self.functions = SizeFunctions(gm, parameters=True)
        self._known: dict[Node, bool] = {}

    def hide_all(self, mask: Node) -> bool:
        """Whether `mask` hides every key from some query, at one of the sizes that tell if they are dynamic."""
        if mask not in self._known:
            self._known[mask] = self.functions.is_size_function(mask) and self._hides_all(mask)
        return self._known[mask]

    def _hides_all(self, mask: Node) -> bool:
        try:
            return any(v.numel() > 0 and bool(fully_masked(v).any()) for _, v in self.functions.samples(mask))
        except NotEvaluable:  # `NormalizeAttentionMask` says so; calibration sees it as it sees others
            return False


def _is_zeroed(gm: GraphModule, node: Node, mask: Node) -> bool:
    """Whether the attention `node` has what this pass puts behind it, folded or not: in a quantized program."""
    user = only_user(node)
    if user is None or not is_call(user, aten.masked_fill.Scalar):
        return False
    rows = user.args[1]
    if isinstance(rows, Node) and is_call(rows, _ROWS[0]):
        return strip(rows, *_ROWS) is strip(mask, *_ROWS)
    folded, stored = constant(gm, rows), constant(gm, mask)
    return folded is not None and stored is not None and torch.equal(folded, fully_masked(stored))


def _rows(mask: Node, like: Node) -> Node:
    """`fully_masked(mask)` as operators that every back end has: Torch-TensorRT has no `all`.

    A NaN hides nothing. The axis is counted from the front: ONNX Runtime does not reduce an empty one that is counted
    from the end.
    """
    emit = Emitter(following(mask), like=like)
    visible = mask
    if dtype(mask).is_floating_point:
        visible = emit(aten.logical_not.default, emit(aten.le.Scalar, mask, HIDDEN_ROUNDED))
    return emit(aten.logical_not.default, emit(aten.any.dim, visible, len(shape(mask)) - 1, True))
