"""Operators that exporters do not know are written with those that they do."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, shape
from passes.normalize.attention_layout import same

__all__ = ["PlainSpellings"]

_RENAMED = {
    aten._is_all_true.default: aten.all.default,
    aten._is_any_true.default: aten.any.default,
}


class PlainSpellings(Pass):
    """Rewrite `_is_all_true` as `all`, `_is_any_true` as `any`, `amax` of all axes with their numbers,
    `masked_select` as indexing, and indexing behind a new axis that goes again as indexing.

    Before:
        _assert_scalar(item(_is_all_true(counts == n)))
        y = masked_select(x, mask)
        z = reshape(index(unsqueeze(x, 0), [None, i]), [-1, 64])    # x[None, i].reshape(-1, 64), as in Mixtral
    After:
        _assert_scalar(item(all(counts == n)))
        y = index(expand(x), [expand(mask)])
        z = index(x, [i])

    Requires: nothing.
    Ensures: the same values; a run of the program in torch checks what the model checked.
    Declines when: never.
    Why: `torch._check_tensor_all`, as in Transformers' vision-language models, leaves operators that no exporter has.
        Exporters leave out assertions, as no file can hold one, and what led to them with `all`.
    """

    clears = tuple(_RENAMED)

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *_RENAMED):
            node.target = _RENAMED[node.target]  # type: ignore[index]
            self.fire()
        for node in calls(gm.graph, aten.amax.default, aten.amin.default):
            if not argument(node, "dim"):
                x = node.args[0]
                assert isinstance(x, Node)
                node.args = (x, list(range(len(shape(x)))), argument(node, "keepdim"))
                node.kwargs = {}
                self.fire()
        for node in calls(gm.graph, aten.masked_select.default):
            x, mask = node.args
            assert isinstance(x, Node) and isinstance(mask, Node)
            emit = Emitter(node)
            if list(shape(x)) != list(shape(mask)):
                x, mask = (
                    emit.getitem(both := emit(aten.broadcast_tensors.default, [x, mask]), 0),
                    emit.getitem(both, 1),
                )
            node.target, node.args = aten.index.Tensor, (x, [mask])  # in place: its size has a symbol
            self.fire()
        for node in calls(gm.graph, aten.reshape.default, aten.squeeze.dim):
            plain = _without_new_axis(node)
            if plain is not None:
                node.replace_all_uses_with(plain)
                self.fire()


def _without_new_axis(node: Node) -> Node | None:
    """`index(x, i)` if that is what `node` makes of `index(unsqueeze(x, 0), [None, *i])`."""
    source = node.args[0]
    if not isinstance(source, Node) or not is_call(source, aten.index.Tensor):
        return None
    x = source.args[0]
    first, *indices = argument(source, "indices")
    if (
        not isinstance(x, Node)
        or not is_call(x, aten.unsqueeze.default)
        or argument(x, "dim") != 0
        or first is not None
    ):
        return None
    if not all(isinstance(i, Node) and dtype(i) is not torch.bool for i in indices):
        return None  # axes in another order, or a size that data decides, which is known by a symbol
    if not same(shape(node), shape(source)[1:]):
        return None
    return Emitter(node)(aten.index.Tensor, x.args[0], indices)
