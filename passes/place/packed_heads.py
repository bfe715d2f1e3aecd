"""Packed Q, K and V are told apart along the axis of heads."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, is_call, only_user, shape

_HEADS_FIRST = (2, 0, 3, 1, 4)  # [B,S,P,H,D] -> [P,B,H,S,D]


class SplitPackedHeads(Pass):
    """Split the result of one packed linear layer with the heads as one axis.

    Before, as timm writes it:
        y = permute(reshape(linear(x, w), [B,S,P,H,D]), [2,0,3,1,4])
        q, k, v = unbind(y, 0)                  # or select(y, 0, i)
    After:
        y = transpose(reshape(linear(x, w), [B,S,P*H,D]), 1, 2)
        q, k, v = split(y, [H,H,H], dim=1)

    Requires: nothing.
    Ensures: the same elements in the same places.
    Declines when: a user of the permuted tensor takes anything but a single q, k or v.
    Why: with the TensorRT-RTX builder the packed form costs three kernels between the GEMM and the attention where
        this one, the form that `MergeParallelLinears` makes of separate layers, costs one.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for permute in calls(gm.graph, aten.permute.default):
            view = permute.args[0]
            if not is_call(view, aten.reshape.default) or not _is_packed(permute):
                continue
            parts = _parts(permute)
            if parts is None:
                self.decline("the packed heads are used in another way than one by one", permute)
                continue
            self._rewrite(permute, parts)
            self.fire()

    def _rewrite(self, permute: Node, parts: list[tuple[Node, int]]) -> None:
        view = permute.args[0]
        assert isinstance(view, Node)
        packed, count, heads, width = view.args[0], *(int(size) for size in shape(view)[2:])
        assert isinstance(packed, Node)
        emit = Emitter(permute)
        batch, length, _ = emit.sizes(packed)
        joined = emit(
            aten.transpose.int, emit(aten.reshape.default, packed, [batch, length, count * heads, width]), 1, 2
        )
        split = emit(aten.split_with_sizes.default, joined, [heads] * count, 1)
        results = [emit.getitem(split, index) for index in range(count)]
        for node, index in parts:
            node.replace_all_uses_with(results[index])


def _is_packed(permute: Node) -> bool:
    """Whether `permute` brings the heads of a [B,S,P,H,D] view of a [B,S,P*H*D] tensor to the front."""
    view = permute.args[0]
    assert isinstance(view, Node)
    if len(shape(view)) != 5 or tuple(int(axis) % 5 for axis in permute.args[1]) != _HEADS_FIRST:  # type: ignore[union-attr, arg-type]
        return False
    packed = shape(view.all_input_nodes[0])
    static = all(isinstance(size, int) for size in shape(view)[2:])
    return static and len(packed) == 3 and only_user(view) is permute and packed[:2] == shape(view)[:2]


def _parts(permute: Node) -> list[tuple[Node, int]] | None:
    """The nodes that take one of the packed tensors each, and which; None if anything else reads `permute`."""
    parts: list[tuple[Node, int]] = []
    count = int(shape(permute)[0])
    for user in permute.users:
        if is_call(user, aten.select.int) and int(user.args[1]) == 0:  # type: ignore[arg-type]
            parts.append((user, int(user.args[2]) % count))  # type: ignore[arg-type]
        elif is_call(user, aten.unbind.int) and argument(user, "dim") == 0:
            parts.extend((item, int(item.args[1])) for item in user.users if item.target is operator.getitem)  # type: ignore[arg-type]
        else:
            return None
    return parts
