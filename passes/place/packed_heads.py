"""Packed Q, K and V are told apart along the axis of heads."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.compat import FakeTensorMode, storage_id
from passes.graph import (
    TRANSPARENT,
    Emitter,
    aten,
    calls,
    fake_call,
    fake_mode,
    following,
    is_call,
    only_user,
    shape,
    val,
)
from passes.normalize.attention_layout import same

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_VIEWS = (
    *(aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.unbind.int, *_SPLITS),
    *(aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.unsqueeze.default, operator.getitem, *TRANSPARENT),
)


class SplitPackedHeads(Pass):
    """Split the result of one packed linear layer with the heads as one axis, whatever views a model takes.

    Before, as timm, GPT-2 and BLOOM write it, or by slices, chunks, fewer heads of keys and values, and so on:
        q, k, v = unbind(permute(reshape(linear(x, w), [B,S,3,H,D]), [2,0,3,1,4]), 0)
        q, k, v = [transpose(reshape(y, [B,S,H,D]), 1, 2) for y in split(linear(x, w), H*D, -1)]
        q, k, v = [transpose(select(reshape(linear(x, w), [B,S,H,3,D]), 3, i), 1, 2) for i in range(3)]
    or, with a layer that multiplies a matrix, of `reshape(linear(x, w), [B,S,N])`.
    After:
        q, k, v = split(transpose(reshape(linear(x, w), [B,S,3*H,D]), 1, 2), [H,H,H], dim=1)
        q, k, v = split(transpose(reshape(linear(x, w), [B,S,H,3*D]), 1, 2), [D,D,D], dim=3)    # BLOOM

    Requires: nothing.
    Ensures: the same elements in the same places.
    Declines when: only some of what the layer makes is heads that are read one by one.
    Why: with the TensorRT-RTX builder other forms cost up to three kernels between the GEMM and the attention where
        these, the first of which `MergeParallelLinears` makes, too, cost one; in INT8 and NVFP4 they leave the GEMM in
        half.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.linear.default):
            linear = _in_batches(node)
            if linear is None or not isinstance(shape(linear)[-1], int):
                continue
            heads, others = _read(linear)
            heads.sort(key=lambda h: h.start)
            if len(heads) < 2 or all(h.is_told_apart for h in heads):
                continue
            axis = None if others else _split_axis(heads, shape(linear)[-1])
            if axis is None:
                self.decline("the packed heads are used in another way than one by one", linear)
                continue
            _split(linear, heads, axis)
            self.fire()


def _in_batches(linear: Node) -> Node | None:
    """The result of `linear` as [B,S,N]: GPT-2's layer multiplies a matrix, and is reshaped behind it."""
    if len(shape(linear)) == 3:
        return linear
    view = only_user(linear)
    if view is None or not is_call(view, aten.reshape.default) or len(shape(view)) != 3:
        return None
    return view if shape(view)[-1] == shape(linear)[-1] else None


@dataclass(frozen=True)
class _Heads:
    """Some heads of what a packed linear layer makes.

    Attributes:
        node: [B,H,S,D], or [B,S,H,D] if `before` the transpose.
        start: the column of the layer's result that they begin at. step: how many columns one begins after another.
        count: H. width: D.
    """

    node: Node
    start: int
    step: int
    count: int
    width: int
    before: bool

    @classmethod
    def read(cls, node: Node, view: torch.Tensor, linear: Node) -> _Heads | None:
        """None if `node`, which is `view` of the result of `linear`, is anything else."""
        batch, length, columns = shape(linear)
        if view.ndim != 4 or not isinstance(view.shape[3], int):
            return None
        for before, (heads, axis) in enumerate(((1, 2), (2, 1))):
            count, step, start = view.shape[heads], view.stride(heads), view.storage_offset()
            found, wanted = (view.shape[0], view.shape[axis], view.stride(axis)), (batch, length, columns)
            if not same((*found, view.stride(3)), (*wanted, 1)):
                continue
            if isinstance(count, int) and isinstance(step, int) and isinstance(start, int):
                return cls(node, start, step if count > 1 else view.shape[3], count, view.shape[3], bool(before))
        return None

    @property
    def is_told_apart(self) -> bool:
        """Whether `node` is written as this pass writes it."""
        split = self.node.args[0]
        joined = split.args[0] if is_call(split, *_SPLITS) else None  # type: ignore[union-attr]
        return is_call(joined, aten.transpose.int) and is_call(joined.args[0], aten.reshape.default)  # type: ignore[union-attr]


def _read(linear: Node) -> tuple[list[_Heads], bool]:
    """The heads among the views of the result of `linear`, and whether any of these views is read in another way."""
    mode = fake_mode(linear.graph)
    with mode:
        views: dict[Node, Any] = {linear: torch.empty_like(val(linear), memory_format=torch.contiguous_format)}
    memory, heads, others = _memory(views[linear]), list[_Heads](), False
    pending = [linear]
    while pending:
        node = pending.pop()
        found = _Heads.read(node, views[node], linear) if isinstance(views[node], torch.Tensor) else None
        if found is not None and not (found.before and all(is_call(user, *_VIEWS) for user in node.users)):
            heads.append(found)
            continue
        for user in node.users:
            view = _view(user, views, mode)
            if view is not None and _memory(view) == memory:
                views[user] = view
                pending.append(user)
            else:
                others |= node is not linear
    return heads, others


def _view(node: Node, views: Mapping[Node, Any], mode: FakeTensorMode) -> Any:
    """What `node` is of the memory of `views`, as if nothing was copied; None if it makes something new."""
    if is_call(node, *TRANSPARENT):
        return views[node.args[0]]  # type: ignore[index]
    if not is_call(node, *_VIEWS):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: views.get(operand, operand))
    return fake_call(mode, node.target, args, kwargs)  # type: ignore[arg-type]


def _memory(view: Any) -> set[int]:
    return {storage_id(tensor) for tensor in pytree.tree_leaves(view)}


def _split_axis(heads: Sequence[_Heads], columns: int) -> int | None:
    """The axis of [B,H,S,D] along which `heads`, in order, are all that there is; None if there is none."""
    counts, width = [h.count for h in heads], heads[0].width
    if {h.width for h in heads} != {width} or width * sum(counts) != columns:
        return None
    starts, steps = [h.start for h in heads], {h.step for h in heads}
    if steps == {width} and starts == [0, *accumulate(count * width for count in counts[:-1])]:
        return 1
    between = steps == {len(heads) * width} and len({*counts}) == 1
    return 3 if between and starts == [index * width for index in range(len(heads))] else None


def _split(linear: Node, heads: Sequence[_Heads], axis: int) -> None:
    emit = Emitter(following(linear), like=linear)
    batch, length, columns = emit.sizes(linear)
    parts = [h.count if axis == 1 else h.width for h in heads]
    width = heads[0].width if axis == 1 else sum(parts)
    assert isinstance(columns, int)
    rows = emit(aten.reshape.default, linear, [batch, length, columns // width, width])
    split = emit(aten.split_with_sizes.default, emit(aten.transpose.int, rows, 1, 2), parts, axis)
    for index, h in enumerate(heads):
        part = emit.getitem(split, index)
        h.node.replace_all_uses_with(emit(aten.transpose.int, part, 1, 2) if h.before else part)
