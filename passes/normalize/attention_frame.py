"""How an attention that reshapes its scores or probabilities on the way is brought to `[B, H, S, D]`.

Used by `NormalizeAttention`. `Layout` does it where the model keeps the leading axes as they are.
"""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import Emitter, aten, is_call, shape
from passes.normalize.attention_layout import Layout, is_one, same
from passes.normalize.attention_scores import RESHAPES, Mask, NotUnderstood, Scores
from passes.sdpa import Attention

__all__ = ["Frame"]


class Frame:
    """How the operands of one attention, its masks and its result are brought to four axes and back.

    `[B*H, S, D]` becomes four axes by a split of the first one if the model itself reshapes its scores so (to add a
    mask); all else is up to `Layout`.

    Args:
        product: the matrix product of probabilities and value, or of the transposes.

    Raises:
        NotUnderstood: the model reshapes in a way that no attention needs.
    """

    def __init__(self, scores: Scores, query: Node, key: Node, value: Node, product: Node) -> None:
        self.scores = scores
        self.query = query
        self.rank = len(shape(scores.product))
        self.out_rank = len(shape(product))
        split = [r for r in scores.reshapes if len(shape(r)) == 4] if self.rank == 3 else []
        self.split = split[0] if split and any(len(m.frame) == 4 for m in scores.masks) else None
        self.layout: Layout | None = None
        if self.split is None and self.out_rank == self.rank:
            self.layout = Layout(query, key, value)
            if not same(self.layout.leading, shape(product)[:-2]):
                raise NotUnderstood("a mask broadcasts the batch or the heads")
            return
        leading = shape(scores.product)[:-2]
        if not same(shape(query)[:-2], leading) or not same(shape(key)[:-2], leading):
            raise NotUnderstood("query and key have different batches or heads, which broadcast")
        if not _same_count(shape(value)[:-2], leading):
            raise NotUnderstood("key and value have different batches or heads, which broadcast")
        if len(shape(value)) != self.out_rank or self.out_rank not in (self.rank, 3) or self.rank not in (3, 4):
            raise NotUnderstood(f"scores of {self.rank} axes meet a value of {len(shape(value))}")

    def attention(self, query: Node, key: Node, value: Node, mask: Node | None, scale: float, emit: Emitter) -> Node:
        """The attention of these operands, in the shape of the model."""
        if self.layout is not None:
            q, k, v = self.layout.query(query, emit), self.layout.key(key, emit), self.layout.value(value, emit)
            result = Attention(q, k, v, mask, scale=scale, enable_gqa=self.layout.enable_gqa).emit(emit)
            return self.layout.restore(result, emit)
        q, k, v = (self._place(operand, emit) for operand in (query, key, value))
        result = Attention(q, k, v, mask, scale=scale).emit(emit)
        if self.out_rank == 4:
            return result
        return emit(aten.reshape.default, result, [-1, *emit.sizes(result)[-2:]])

    def _place(self, operand: Node, emit: Emitter) -> Node:
        """`operand` `[..., S, D]` on four axes."""
        if len(shape(operand)) == 4:
            return operand
        sizes = emit.sizes(operand)[-2:]
        if self.split is None:
            return emit(aten.reshape.default, operand, [*emit.sizes(self.query)[:2], *sizes])
        wanted = [*shape(self.split)[:2], *shape(operand)[-2:]]
        source = operand.args[0] if is_call(operand, *RESHAPES) else None
        if isinstance(source, Node) and same(shape(source), wanted):
            return source
        return emit(aten.reshape.default, operand, [*_written(self.split)[:2], *sizes])

    def masks(self, masks: list[Mask], emit: Emitter) -> list[Node]:
        """The nodes of `masks` so that they broadcast to scores of four axes."""
        plans = [self._plan(mask) for mask in masks]  # all are understood before anything is written
        return [self._mask(mask, plan, emit) for mask, plan in zip(masks, plans, strict=True)]

    def _plan(self, mask: Mask) -> list[Any]:
        """The sizes to expand the leading axes of `mask` to before they are merged; empty if they stay.

        Raises:
            NotUnderstood: a size is not known.
        """
        rank = len(mask.frame)
        if self.split is not None and same(mask.frame, shape(self.split)):
            return []
        if rank == self.rank and (not self.scores.reshapes or same(mask.frame, shape(self.scores.product))):
            return []
        sizes: list[Any] = []
        written = next((_written(r) for r in self.scores.reshapes if same(shape(r), mask.frame)), [-1] * rank)
        for axis in range(rank - 3):
            size = mask.frame[axis] if isinstance(mask.frame[axis], int) else written[axis]
            if size == -1:
                raise NotUnderstood(f"{mask.node.name} is added to scores of an unknown shape")
            sizes.append(size)
        merged = math.prod(mask.frame[: rank - 3])
        if self.rank != 4 or rank < 5 or not statically_known_true(merged == shape(self.scores.product)[0]):
            raise NotUnderstood(f"{mask.node.name} is added to scores of shape {tuple(mask.frame)}")
        return sizes

    def _mask(self, mask: Mask, expanded: list[Any], emit: Emitter) -> Node:
        node = mask.node
        if self.layout is not None and not expanded:
            return self.layout.mask(node, emit)
        while len(shape(node)) < (len(expanded) + 3 if expanded else 2):
            node = emit(aten.unsqueeze.default, node, 0)
        if not expanded:
            own_batch = len(shape(node)) == len(mask.frame) == 3 and not is_one(shape(node)[0])
            return self._place(node, emit) if own_batch else node
        rest = emit.sizes(node)[-3:]
        if all(map(is_one, shape(node)[:-3])):
            return emit(aten.reshape.default, node, [1, *rest])
        node = emit(aten.expand.default, node, [*expanded, -1, -1, -1])
        return emit(aten.reshape.default, node, [-1, *rest])


def _written(reshape: Node) -> list[Any]:
    """The sizes that `reshape` was called with: numbers, nodes, at most one of them -1."""
    return list(reshape.args[1])  # type: ignore[arg-type]


def _same_count(a: Any, b: Any) -> bool:
    return statically_known_true(math.prod(a) == math.prod(b))
