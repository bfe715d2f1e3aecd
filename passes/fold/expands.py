"""What is computed of one row repeated is computed of the row, and repeated then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.base import Pass
from passes.dependence import fixed_nodes
from passes.graph import Emitter, ancestors, argument, aten, calls, is_call, is_pointwise, shape
from passes.operators import NORMS
from passes.sdpa import SDPA

__all__ = ["ExpandsLast"]

_PRODUCTS = (aten.linear.default, SDPA)


class ExpandsLast(Pass):
    """Move the expand of learned vectors to a dynamic batch behind the layers that work on them.

    Before, learned queries [1,N,D]:
        y = transpose(reshape(linear(add(expand(queries, [b,N,D]), positions), w), [b,N,H,D/H]), 1, 2)
    After:
        y = expand(transpose(reshape(linear(add(queries, positions), w), [1,N,H,D/H]), 1, 2), [b,H,N,D/H])

    Requires: `ViewsToReshape` ran.
    Ensures: bit-equal rows, each computed once; where all is made of constants, `FoldFixed` stores it.
    Declines when: never. What is neither pointwise, a norm of the last axes, a rearrangement, a linear layer nor an
        attention stays, and what an input reaches is not looked at.
    Why: a layer of what is expanded to a dynamic size cannot be stored, and would run at every call.
    """

    def rewrite(self, gm: GraphModule) -> None:
        fixed = fixed_nodes(gm)
        behind = {node for node in calls(gm.graph, *_PRODUCTS) if node in fixed}
        before = ancestors(behind)
        for node in [node for node in gm.graph.nodes if node in fixed and node.op == "call_function"]:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
            if (node in before or node in behind) and (moved := _moved(node)):
                behind.add(moved)
                node.replace_all_uses_with(moved)
                gm.graph.erase_node(node)  # dead code elimination keeps an SDPA, which could draw dropout
                self.fire()


@dataclass(frozen=True)
class _Repeated:
    """An expand: `source`, of which axis `i` is repeated `counts[i]` times where that is not None."""

    source: Node
    counts: list[Any]

    @classmethod
    def read(cls, node: object) -> _Repeated | None:
        """`node` as an expand with known counts, which are all of its dynamic sizes."""
        if not isinstance(node, Node) or not is_call(node, aten.expand.default):
            return None
        source, sizes = node.args[:2]
        assert isinstance(source, Node) and isinstance(sizes, (list, tuple))
        own = [1] * (len(sizes) - len(shape(source))) + list(shape(source))
        if not all(isinstance(size, int) for size in own):
            return None
        counts = [None if s == -1 or made == had else s for s, made, had in zip(sizes, shape(node), own, strict=True)]
        return cls(source, counts)

    def whole(self, emit: Emitter) -> Node:
        """`source` with all axes of the expand."""
        added = len(self.counts) - len(shape(self.source))
        return emit(aten.reshape.default, self.source, [1] * added + list(shape(self.source))) if added else self.source

    def again(self, emit: Emitter, result: Node, counts: list[Any]) -> Node:
        """`result`, computed of `source`, repeated."""
        sizes = [size if count is None else count for size, count in zip(shape(result), counts, strict=True)]
        return emit(aten.expand.default, result, sizes)


def _moved(node: Node) -> Node | None:
    """What `node` computes, with the expand of its operands behind it; None if that cannot be."""
    first = next((found for n in node.all_input_nodes if (found := _Repeated.read(n)) is not None), None)
    if first is None or not any(count is not None for count in first.counts):
        return None
    if is_pointwise(node):
        return _pointwise(node, first)
    if is_call(node, SDPA):
        return _attention(node, first)
    if _Repeated.read(node.args[0]) is None:
        return None
    emit, counts = Emitter(node), first.counts
    if is_call(node, aten.linear.default):
        return _layer(node, first, 1)
    if is_call(node, *NORMS):
        return _layer(node, first, len(argument(node, "normalized_shape")))
    if is_call(node, aten.transpose.int, aten.permute.default):
        order = list(range(len(counts)))
        if is_call(node, aten.permute.default):
            order = [int(axis) % len(order) for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            a, b = (int(axis) % len(order) for axis in node.args[1:])  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        result = emit(node.target, first.whole(emit), *node.args[1:])  # type: ignore[arg-type]
        return first.again(emit, result, [counts[axis] for axis in order])
    if is_call(node, aten.reshape.default) and counts[1:] == [None] * (len(counts) - 1):
        rest = list(shape(node)[1:])
        if all(isinstance(size, int) for size in rest) and shape(node)[0] == shape(node.args[0])[0]:  # type: ignore[arg-type]
            result = emit(aten.reshape.default, first.source, [1, *rest])
            return first.again(emit, result, [counts[0], *[None] * len(rest)])
    return None


def _pointwise(node: Node, first: _Repeated) -> Node | None:
    """Of operands that are repeated alike, or have one row for all of them."""
    new: dict[Node, Node] = {}
    for operand in node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return None
        if (repeated := _Repeated.read(operand)) is not None and list(shape(operand)) == list(shape(node)):
            if [c is None for c in repeated.counts] != [c is None for c in first.counts]:
                return None
            new[operand] = repeated.source
            continue
        sizes = [1] * (len(first.counts) - len(shape(operand))) + list(shape(operand))
        if len(sizes) != len(first.counts) or any(
            size != 1 for size, count in zip(sizes, first.counts, strict=True) if count is not None
        ):
            return None
        new[operand] = operand
    emit = Emitter(node)
    result = emit(node.target, *_replaced(node.args, new), **_replaced(node.kwargs, new))  # type: ignore[arg-type]
    return first.again(emit, result, first.counts) if len(shape(result)) == len(first.counts) else None


def _layer(node: Node, first: _Repeated, axes: int) -> Node | None:
    """A layer that works along the last `axes`."""
    if any(count is not None for count in first.counts[-axes:]):
        return None
    emit = Emitter(node)
    result = emit(node.target, first.whole(emit), *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return first.again(emit, result, first.counts)


def _attention(node: Node, first: _Repeated) -> Node | None:
    """Attention of what is repeated along the batch alone, without a mask."""
    operands = [_Repeated.read(operand) for operand in node.args[:3]]
    only_batch = [count is None for count in first.counts] == [False] + [True] * (len(first.counts) - 1)
    if not only_batch or any(
        o is None or (o.counts[0] is None, *o.counts[1:]) != (False, None, None, None) for o in operands
    ):
        return None
    if any(isinstance(value, Node) for value in (*node.args[3:], *node.kwargs.values())):
        return None
    emit = Emitter(node)
    result = emit(SDPA, *(o.whole(emit) for o in operands if o is not None), *node.args[3:], **node.kwargs)
    return first.again(emit, result, first.counts)


def _replaced(values: Any, new: dict[Node, Node]) -> Any:
    return map_arg(values, lambda n: new.get(n, n))
