"""A tensor that is filled piece by piece becomes a concatenation."""

from __future__ import annotations

import itertools

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, shape
from passes.normalize.attention_layout import same

__all__ = ["ScattersToConcat"]


class ScattersToConcat(Pass):
    """Rewrite writes to neighbouring slices that together fill a tensor.

    Before, the functional form of `y[..., :a] = s; y[..., a:] = t`:
        h = slice_scatter(empty, copy(slice(empty, -1, 0, a), s), -1, 0, a)
        y = slice_scatter(h, copy(slice(h, -1, a, n), t), -1, a, n)
    After:
        y = cat([s, t], -1)

    Requires: a functional graph.
    Ensures: the same values; another user of `h` keeps it.
    Declines when: the pieces overlap, leave a gap, or their places are dynamic. A tensor that is written to once only,
        as a cache is, is not looked at.
    Why: ONNX writes a slice as a ScatterND with two transposes and its indices, and TensorRT runs that as kernels of
        their own and takes the axis for a dynamic one. Keys of multi-head latent attention are made so.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.slice_scatter.default):
            if any(is_call(user, aten.slice_scatter.default) and user.args[0] is node for user in node.users):
                continue  # a later one ends the chain
            chain = _chain(node)
            if len(chain) < 2:
                continue
            axis = _axis(node)
            pieces = _pieces(chain, int(shape(node)[axis])) if isinstance(shape(node)[axis], int) else None
            if pieces is None:
                self.decline("what is written to this tensor does not fill it side by side", node)
                continue
            node.replace_all_uses_with(Emitter(node)(aten.cat.default, pieces, axis))
            self.fire()


def _axis(node: Node) -> int:
    return int(argument(node, "dim")) % len(shape(node))


def _chain(last: Node) -> list[Node]:
    """The writes along one axis that end with `last`."""
    chain = [last]
    before = last.args[0]
    while isinstance(before, Node) and is_call(before, aten.slice_scatter.default) and _axis(before) == _axis(last):
        chain.append(before)
        before = before.args[0]
    return chain


def _pieces(chain: list[Node], size: int) -> list[Node] | None:
    """What the writes of `chain` put side by side into an axis of `size`; None if they do anything else."""
    found: list[tuple[int, int, Node]] = []
    for write in chain:
        source, start, end = (argument(write, name) for name in ("src", "start", "end"))
        start, end = start or 0, size if end is None else end
        if not isinstance(start, int) or not isinstance(end, int) or argument(write, "step") != 1:
            return None
        start, end = (min(max(at + size if at < 0 else at, 0), size) for at in (start, end))
        found.append((start, end, _copied(source)))
    found.sort(key=lambda piece: piece[:2])
    borders = [0, *(end for _, end, _ in found)]
    side_by_side = all(start == before for (start, _, _), before in zip(found, borders, strict=False))
    if not side_by_side or borders[-1] != size or any(a >= b for a, b in itertools.pairwise(borders)):
        return None
    return [source for _, _, source in found]


def _copied(piece: Node) -> Node:
    """What `piece` is a copy of, if the copy changes neither its shape nor its dtype."""
    source = piece.args[1] if is_call(piece, aten.copy.default) else None
    if isinstance(source, Node) and dtype(source) is dtype(piece) and same(shape(source), shape(piece)):
        return source
    return piece
