"""The shape `[B, H, S, D]` for attentions that are written on `[B*H, S, D]` or with more leading axes.

Used by `NormalizeAttention`. TensorRT fuses attention of four axes only.
"""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import Emitter, aten, is_call, shape
from passes.normalize.attention_scores import RESHAPES, Mask, NotUnderstood, Scores, same

__all__ = ["Frame"]


class Frame:
    """How the operands of one attention, its masks and its result are brought to four axes and back.

    Three axes become four by a split of the first one if the model itself reshapes its scores so (to add a mask), else
    with one head; more than four become four by merging all before the heads.

    Raises:
        NotUnderstood: the leading axes of query, key, value and scores are not the same.
    """

    def __init__(self, scores: Scores, query: Node, key: Node, value: Node) -> None:
        self.scores = scores
        self.query = query
        self.rank = len(shape(scores.product))
        leading = shape(scores.product)[:-2]
        if self.rank < 3:
            raise NotUnderstood("query and key are matrices, without an axis for heads or the batch")
        one_head = [*leading[:-1], 1]
        self.one_head = self.rank == 4 and all(same(shape(n)[:-2], one_head) for n in (key, value))
        self.one_head = self.one_head and not statically_known_true(leading[-1] == 1)
        if not same(shape(query)[:-2], leading) or not (self.one_head or same(shape(key)[:-2], leading)):
            raise NotUnderstood("query and key have different batches or heads, which broadcast")
        if not self.one_head and not _same_count(shape(value)[:-2], leading):
            raise NotUnderstood("key and value have different batches or heads, which broadcast")
        self.out_rank = len(shape(value))
        if self.out_rank not in (self.rank, 3):
            raise NotUnderstood(f"scores of {self.rank} axes meet a value of {self.out_rank}")
        split = [r for r in scores.reshapes if len(shape(r)) == 4] if self.rank == 3 else []
        self.split = split[0] if split and any(len(m.frame) == 4 for m in scores.masks) else None

    def place(self, operand: Node, emit: Emitter) -> Node:
        """`operand` `[..., S, D]` on four axes."""
        rank = len(shape(operand))
        if rank == 4:
            return operand
        if self.split is None and self.rank == 3:
            return emit(aten.unsqueeze.default, operand, 1)
        sizes = emit.sizes(operand)[-2:]
        if self.split is not None:
            wanted = [*shape(self.split)[:2], *shape(operand)[-2:]]
            source = operand.args[0] if is_call(operand, *RESHAPES) else None
            if isinstance(source, Node) and same(shape(source), wanted):
                return source
            return emit(aten.reshape.default, operand, [*_written(self.split)[:2], *sizes])
        if self.rank == 4:
            return emit(aten.reshape.default, operand, [*emit.sizes(self.query)[:2], *sizes])
        return emit(aten.reshape.default, operand, [-1, emit.sizes(self.query)[-3], *sizes])

    def restore(self, result: Node, emit: Emitter) -> Node:
        """The attention's `result` on as many axes as the model has."""
        if self.out_rank == 4:
            return result
        if self.out_rank == 3 and self.split is None and self.rank == 3:
            return emit(aten.squeeze.dim, result, 1)
        sizes = emit.sizes(result)[-2:]
        leading = [-1] if self.out_rank == 3 else emit.sizes(self.query)[:-2]
        return emit(aten.reshape.default, result, [*leading, *sizes])

    def masks(self, masks: list[Mask], emit: Emitter) -> list[Node]:
        """The nodes of `masks` so that they broadcast to scores of four axes."""
        plans = [self._plan(mask) for mask in masks]  # all are understood before anything is written
        return [self._mask(mask.node, plan, emit) for mask, plan in zip(masks, plans, strict=True)]

    def _plan(self, mask: Mask) -> list[Any]:
        """The sizes to expand the leading axes of `mask` to before they are merged; empty if they stay.

        Raises:
            NotUnderstood: a size is not known.
        """
        rank = len(mask.frame)
        if rank == self.rank or (self.split is not None and same(mask.frame, shape(self.split))):
            return []
        sizes: list[Any] = []
        written = next(_written(r) for r in self.scores.reshapes if same(shape(r), mask.frame))
        for axis in range(rank - 3):
            size = mask.frame[axis] if isinstance(mask.frame[axis], int) else written[axis]
            if size == -1:
                raise NotUnderstood(f"{mask.node.name} is added to scores of an unknown shape")
            sizes.append(size)
        merged = math.prod(mask.frame[: rank - 3])
        if self.rank != 4 or rank < 5 or not statically_known_true(merged == shape(self.scores.product)[0]):
            raise NotUnderstood(f"{mask.node.name} is added to scores of shape {tuple(mask.frame)}")
        return sizes

    def _mask(self, node: Node, expanded: list[Any], emit: Emitter) -> Node:
        if expanded or self.rank > 4:
            return self._merged(node, expanded, emit)
        while len(shape(node)) < 2:
            node = emit(aten.unsqueeze.default, node, 0)
        if len(shape(node)) == 3 and self.rank == 3 and not statically_known_true(shape(node)[0] == 1):
            return self.place(node, emit)
        return node

    def _merged(self, node: Node, expanded: list[Any], emit: Emitter) -> Node:
        """`node` with its leading axes, all before the heads, expanded and merged into one."""
        leading = expanded or emit.sizes(self.query)[:-3]
        rank = len(leading) + 3
        while len(shape(node)) < rank:
            node = emit(aten.unsqueeze.default, node, 0)
        rest = emit.sizes(node)[-3:]
        if all(statically_known_true(size == 1) for size in shape(node)[:-3]):
            return emit(aten.reshape.default, node, [1, *rest])
        node = emit(aten.expand.default, node, [*leading, -1, -1, -1])
        return emit(aten.reshape.default, node, [-1, *rest])


def _written(reshape: Node) -> list[Any]:
    """The sizes that `reshape` was called with: numbers, nodes, at most one of them -1."""
    return list(reshape.args[1])  # type: ignore[arg-type]


def _same_count(a: Any, b: Any) -> bool:
    return statically_known_true(math.prod(a) == math.prod(b))
