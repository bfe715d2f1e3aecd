"""Attention written out as matmul, softmax, matmul becomes one node."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, shape
from passes.normalize.attention_frame import Frame
from passes.normalize.attention_probabilities import Probabilities, lies_between_products, read_probabilities
from passes.normalize.attention_scores import (
    Mask,
    NotUnderstood,
    Scores,
    is_float_cast,
    read_scores,
    unscaled,
)
from passes.sdpa import SOFTMAXES

__all__ = ["NormalizeAttention"]

_OTHERWISE = (
    "the attention probabilities have another user, or a column without a value, or are changed before they meet the"
    " value in a way that attention has no argument for"
)
_STAYS = "; its products stay in floating point, as TensorRT fuses no such attention and quantizers would add kernels"
_OVER_QUERIES = "the softmax of query times key goes over axis {}, not over the keys, before it meets the value"
_NO_SOFTMAX = "{} makes the weights of query times key before they meet the value, not a softmax over the keys"
_OTHER_WEIGHTS = (aten.sigmoid.default, aten.exp.default, aten.relu.default, aten.softplus.default, aten.tanh.default)


class NormalizeAttention(Pass):
    """Rewrite eager attention as `scaled_dot_product_attention`.

    Before:
        scores = matmul(q * a, transpose(k, -1, -2)) * b + mask      # or where, masked_fill, baddbmm, several masks
        p = to(softmax(to(scores, fp32), -1), fp16)                  # the casts if the model has them
        p = masked_fill(nan_to_num(p), mask, 0) * gate[..., :1]      # if the model has that
        y = matmul(p, v)                                             # or bmm, on [B*H, S, D]
        z = matmul(transpose(v), softmax(matmul(k, transpose(q)), -2))    # the transposes
    After:
        y = sdpa(q, k, v, mask, 0.0, False, scale=a * b) * gate      # on [B, H, S, D]
        z = transpose(sdpa(q, k, v))

    Requires: `ViewsToReshape` and `RemoveNoOps` ran.
    Ensures: the same values up to rounding (scores are scaled and rounded elsewhere). Masks are boolean (true: visible)
        if the model replaces scores and are in the dtype of q if it adds to them; several are combined. Zeros in the
        place of a NaN, or of probabilities that a mask of the scores hides, are left to the mask.
    Declines when: scores or probabilities have another user (a model that returns attentions), or something happens
        to scores or probabilities that attention has no argument for; the softmax goes over queries, or weights are
        made by a sigmoid or another function of each score; there is one key only.
    Why: attention has one form for all later passes, whatever order a model scales, masks and casts in.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for softmax in calls(gm.graph, *SOFTMAXES):
            scores, axis, rank = softmax.args[0], argument(softmax, "dim"), len(shape(softmax))
            if not isinstance(scores, Node) or not rank:
                continue
            transposed = axis % rank == rank - 2
            use = read_probabilities(gm, softmax, transposed=transposed) if axis % rank >= rank - 2 else None
            if use is None:
                if lies_between_products(softmax):
                    reason = _OTHERWISE if axis % rank == rank - 1 else _OVER_QUERIES.format(axis)
                    self.decline(reason + _STAYS, softmax)
                continue
            try:
                new = _attention(gm, read_scores(gm, scores, swapped=transposed), use, softmax)
            except NotUnderstood as why:
                self.decline(f"{why}{_STAYS}", softmax)
                continue
            use.product.replace_all_uses_with(new)
            self.fire()
        for weights in calls(gm.graph, *_OTHER_WEIGHTS):
            if len(shape(weights)) > 1 and lies_between_products(weights, closely=True):
                self.decline(_NO_SOFTMAX.format(weights.target) + _STAYS, weights)


def _attention(gm: GraphModule, scores: Scores, use: Probabilities, softmax: Node) -> Node:
    """Write the attention whose scores are `scores` and whose last product is `use.product`; its result, shaped so.

    Raises:
        NotUnderstood: the operands' dtypes or shapes are not those of an attention. Nothing has been written then.
    """
    use.check(scores.masks)
    if statically_known_true(shape(softmax)[-2 if use.transposed else -1] == 1):
        raise NotUnderstood("it attends to one key, whose value it gives")
    left, right = scores.product.args[-2:]
    if any(len(shape(operand)) < 2 for operand in (left, right, use.value)):  # type: ignore[arg-type]
        raise NotUnderstood("query, key or value is a single vector")
    value, value_axes = _untransposed(use.value) if use.transposed else (use.value, None)
    assert isinstance(left, Node) and isinstance(right, Node)
    query, key = (right, left) if scores.swapped else (left, right)
    frame = Frame(scores, query, key, use.value, use.product)
    query, query_axes, query_scale = _rows(gm, query, dtype(value), transposed=scores.swapped)
    key, key_axes, key_scale = _rows(gm, key, dtype(value), transposed=not scores.swapped)
    if not dtype(query) == dtype(key) == dtype(value):
        raise NotUnderstood(f"query, key and value are {dtype(query)}, {dtype(key)} and {dtype(value)}")
    emit = Emitter(before=use.product, like=softmax)
    query, key, value = (
        operand if axes is None else emit(aten.permute.default, operand, axes)
        for operand, axes in ((query, query_axes), (key, key_axes), (value, value_axes))
    )
    mask = _combined(frame, scores.masks, dtype(query), emit)
    scale = scores.scale * query_scale * key_scale
    return use.finished(frame.attention(query, key, value, mask, scale, emit), emit)


def _rows(
    gm: GraphModule, node: Node, wanted: torch.dtype, *, transposed: bool
) -> tuple[Node, list[int] | None, float]:
    """(x, axes, scale): `node`, or its transpose if `transposed`, is `scale` times x permuted by `axes`, if any."""
    node, scale = _operand(gm, node, wanted)
    if not transposed:
        return node, None, scale
    node, axes = _untransposed(node)
    node, more = _operand(gm, node, wanted)
    return node, axes, scale * more


def _operand(gm: GraphModule, node: Node, wanted: torch.dtype) -> tuple[Node, float]:
    """`node` before it was scaled, and before it was cast from `wanted` to a wider type; with the scale."""
    scale = 1.0
    while True:
        source, number = unscaled(gm, node)
        scale *= number
        if is_float_cast(source) and dtype(source) is not wanted:
            before = source.args[0]
            if isinstance(before, Node) and dtype(before) is wanted:
                source = before
        if source is node:
            return node, scale
        node = source


def _untransposed(node: Node) -> tuple[Node, list[int] | None]:
    """A node and a permutation of it (None: itself) that is `node` `[..., D, S]` with its last two axes swapped."""
    rank = len(shape(node))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    source = node.args[0]
    if is_call(node, aten.transpose.int) and {axis % rank for axis in node.args[1:]} == {rank - 1, rank - 2}:  # type: ignore[operator]
        return source, None  # type: ignore[return-value]
    if is_call(node, aten.permute.default):
        axes = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr, operator]
        axes = [axes[axis] for axis in swapped]
        return source, None if axes == sorted(axes) else axes  # type: ignore[return-value]
    return node, swapped


def _combined(frame: Frame, masks: list[Mask], wanted: torch.dtype, emit: Emitter) -> Node | None:
    """One mask that does what `masks` do: boolean if all only hide, else of dtype `wanted` and added."""
    added: Node | None = None
    visible: Node | None = None
    for mask, node in zip(masks, frame.masks(masks, emit), strict=True):
        if dtype(node) is torch.bool:
            node = emit(aten.logical_not.default, node) if mask.negated else node
            visible = node if visible is None else emit(aten.__and__.Tensor, visible, node)
            continue
        if mask.factor != 1:
            node = emit(aten.mul.Tensor, node, mask.factor)
        if dtype(node) is not wanted:
            limits = torch.finfo(wanted)
            if torch.finfo(dtype(node)).max > limits.max:  # the lowest float32 would become -inf
                node = emit(aten.clamp.default, node, limits.min / 2, limits.max)
            node = emit(aten._to_copy.default, node, dtype=wanted)
        added = node if added is None else emit(aten.add.Tensor, added, node)
    if added is None or visible is None:
        return visible if added is None else added
    # half of the lowest number: it stays finite with a score added, so a row that is hidden as a whole is no NaN
    return emit(aten.where.ScalarOther, visible, added, torch.finfo(wanted).min / 2)
