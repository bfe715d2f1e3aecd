"""The shape `[B, H, S, D]` for attentions of any number of axes, whose operands may broadcast.

TensorRT fuses attention of four axes only, and torch.onnx exports no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import Emitter, aten, shape, swaps_last_two

__all__ = ["Layout", "is_one", "same"]


class Layout:
    """How query, key, value, mask and result of one attention are brought to four axes and back.

    Leading axes, all but the last two, are those of a batch; operands broadcast over them as in `matmul`. The last
    one becomes the heads if there is another, and the others are merged into the batch. Where key and value broadcast
    over the last axis (one key head for a group of query heads) nothing is repeated: attention takes grouped heads.

    Attributes:
        leading: sizes of the leading axes, broadcast.
        enable_gqa: whether key and value have fewer heads in the normal form.

    Args:
        query, key, value: `[..., S, D]`, `[..., T, D]` and `[..., T, Dv]`; the last two axes are not looked at.
        enable_gqa: whether key and value have fewer heads than the query, as torch's argument says.
    """

    def __init__(self, query: Node, key: Node, value: Node, *, enable_gqa: bool = False) -> None:
        operands = (query, key, value)
        self.rank = max(len(shape(operand)) for operand in operands) - 2
        of_operand = [[1] * (self.rank + 2 - len(shape(n))) + list(shape(n)[:-2]) for n in operands]
        self._sources = [self._source(axis, operands, of_operand) for axis in range(self.rank)]
        self.leading = [1 if source is None else shape(source[0])[source[1]] for source in self._sources]
        self.kv_heads: Any = None if not self.rank else self.leading[-1]
        self._grouped_axes = 1 if enable_gqa else 0  # how many axes the heads of the query are made of
        if enable_gqa:
            self.kv_heads = of_operand[1][-1]
        elif self.rank and all(is_one(sizes[-1]) for sizes in of_operand[1:]) and not is_one(self.leading[-1]):
            static = all(isinstance(size, int) for size in self.leading[-2:])
            if self.rank <= 2 or static:  # one axis is not known to be divisible by another
                self._grouped_axes, self.kv_heads = (1 if self.rank <= 2 else 2), 1
        wanted = [self.leading, *[self._of_key()] * 2]
        self._expands = [not same(sizes, want) for sizes, want in zip(of_operand, wanted, strict=True)]
        self.enable_gqa = self._grouped_axes > 0

    @property
    def changes(self) -> bool:
        """Whether anything has another shape in the normal form."""
        return self.rank != 2 or any(self._expands)

    def query(self, node: Node, emit: Emitter) -> Node:
        """`node` `[..., S, D]` as `[B, H, S, D]`."""
        return self._placed(node, self._expands[0], self._sizes(emit), emit)

    def key(self, node: Node, emit: Emitter) -> Node:
        """`node` `[..., T, D]`, shaped as the key, as `[B, Hkv, T, D]`."""
        return self._placed(node, self._expands[1], self._of_key(self._sizes(emit)), emit)

    def value(self, node: Node, emit: Emitter) -> Node:
        """`node` `[..., T, Dv]` as `[B, Hkv, T, Dv]`."""
        return self._placed(node, self._expands[2], self._of_key(self._sizes(emit)), emit)

    def mask(self, node: Node, emit: Emitter) -> Node:
        """`node`, which broadcasts to the scores `[..., S, T]`, so that it broadcasts to `[B, H, S, T]`."""
        while len(shape(node)) < 2:
            node = emit(aten.unsqueeze.default, node, 0)
        if self.rank < 3:
            own_batch = (
                self.rank == 1 and len(shape(node)) == 3 and self._added_axis() == 1 and not is_one(shape(node)[0])
            )
            return emit(aten.unsqueeze.default, node, 1) if own_batch else node
        if len(shape(node)) == 2:
            return node
        while len(shape(node)) < self.rank + 2:
            node = emit(aten.unsqueeze.default, node, 0)
        rest, sizes = emit.sizes(node)[-2:], self._sizes(emit)
        wanted, split = list(self.leading), self._split()
        for part in (slice(0, split), slice(split, self.rank)):
            if all(map(is_one, shape(node)[: self.rank][part])):
                sizes[part] = wanted[part] = [1] * len(sizes[part])
        if not same(shape(node)[: self.rank], wanted):
            node = emit(aten.expand.default, node, [*sizes, -1, -1])
        return emit(aten.reshape.default, node, [merged(sizes[:split]), merged(sizes[split:]), *rest])

    def restore(self, result: Node, emit: Emitter) -> Node:
        """The attention's `result` `[B, H, S, Dv]` with the axes that the model has."""
        if self.rank == 2:
            return result
        if self.rank == 1:
            return emit(aten.squeeze.dim, result, self._added_axis())
        rest = emit.sizes(result)[-2:]
        return emit(aten.reshape.default, result, [*self._sizes(emit), *rest])

    @staticmethod
    def _source(axis: int, operands: Sequence[Node], leading: list[list[Any]]) -> tuple[Node, int] | None:
        """An operand that does not broadcast over the leading axis `axis`, and which of its axes that is."""
        for operand, sizes in zip(operands, leading, strict=True):
            if not is_one(sizes[axis]):
                return operand, axis - len(sizes) + len(shape(operand)) - 2
        return None

    def _sizes(self, emit: Emitter) -> list[Any]:
        """The leading sizes as arguments of an operator."""
        return [1 if source is None else emit.sizes(source[0])[source[1]] for source in self._sources]

    def _of_key(self, sizes: list[Any] | None = None) -> list[Any]:
        """The leading sizes of key and value."""
        return [*(self.leading if sizes is None else sizes)[:-1], *([self.kv_heads] if self.rank else [])]

    def _added_axis(self) -> int:
        """Which axis of four `[N, S, D]` lacks: the heads if N is dynamic. TensorRT fuses no single head with a mask,
        and not every dynamic number of heads."""
        return 0 if self.enable_gqa or (self.rank == 1 and isinstance(self.leading[0], int)) else 1

    def _with_axis(self, node: Node, emit: Emitter) -> Node:
        """`node` `[N, S, D]` with the axis that four lack, added in front of a transpose of the last two: between that
        and a quantizer it hinders fusion where a convolution made the heads."""
        if len(shape(node)) == 3 and swaps_last_two(node):
            source = emit(aten.unsqueeze.default, node.args[0], self._added_axis())
            return emit(aten.transpose.int, source, -1, -2)
        return emit(aten.unsqueeze.default, node, self._added_axis())

    def _split(self) -> int:
        """How many leading axes are merged into the batch."""
        if self.rank and (self.enable_gqa or isinstance(self.leading[-1], int)):
            return self.rank - (self._grouped_axes or 1)
        return self.rank  # a number of heads that is not known hinders fusion

    def _placed(self, node: Node, expand: bool, sizes: list[Any], emit: Emitter) -> Node:
        rest = emit.sizes(node)[-2:]
        if expand:
            node = emit(aten.expand.default, node, [*sizes, -1, -1])
        if self.rank == 2:
            return node
        if self.rank == 1:
            return self._with_axis(node, emit)
        split = self._split()
        return emit(aten.reshape.default, node, [merged(sizes[:split]), merged(sizes[split:]), *rest])


def merged(sizes: Sequence[Any]) -> Any:
    """The size of axes of `sizes` as one: -1 if it is not known."""
    if len(sizes) == 1:
        return sizes[0]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else -1


def is_one(size: Any) -> bool:
    """Whether `size` is known to be 1."""
    return bool(statically_known_true(size == 1))


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are provably the same."""
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))
