"""Operators that exporters do not know are written with those that they do."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, shape

__all__ = ["PlainSpellings"]

_RENAMED = {
    aten._is_all_true.default: aten.all.default,
    aten._is_any_true.default: aten.any.default,
}


class PlainSpellings(Pass):
    """Rewrite `_is_all_true` as `all`, `_is_any_true` as `any`, `amax` of all axes with their numbers, and
    `masked_select` as indexing.

    Before:
        _assert_scalar(item(_is_all_true(counts == n)))
        y = masked_select(x, mask)
    After:
        _assert_scalar(item(all(counts == n)))
        y = index(expand(x), [expand(mask)])

    Requires: nothing.
    Ensures: the same values; a run of the program in torch checks what the model checked.
    Declines when: never.
    Why: `torch._check_tensor_all`, as in Transformers' vision-language models, leaves operators that no exporter has.
        Exporters leave out assertions, as no file can hold one, and what led to them with `all`.
    """

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
