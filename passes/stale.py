"""Whether the metadata of a graph still says what its calls make, behind a pass that has changed some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.compat import data_dependent
from passes.graph import fake_again, place_of
from passes.text import dtype_name

__all__ = ["stale"]

Calls = Mapping[Node, tuple[Any, ...]]


def stale(before: Calls, after: Calls) -> Iterator[str]:
    """A sentence for each call that does not make what its `meta["val"]` says, or cannot be made at all.

    Only what a pass can have touched is asked: calls that are new or read something else, and readers of new values.

    Args:
        before, after: node -> (target, args, kwargs, value in the metadata).
    """
    for node, call in after.items():
        if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        operands = node.all_input_nodes
        if any(made.meta.get("val") is None for made in (node, *operands)):
            continue
        if _same(before.get(node), call) and all(_same_value(before, after, operand) for operand in operands):
            continue
        try:
            made = fake_again(node)
        except data_dependent():
            continue  # nobody knows before it runs
        except Exception as error:  # whatever an operator has against its arguments
            said = str(error).strip().partition("\n")[0]
            yield f"{node.name} of {place_of(node)} cannot be computed from what it reads now: {said}"
            continue
        pairs = zip(pytree.tree_leaves(made), pytree.tree_leaves(node.meta["val"]), strict=False)
        wrong = next(((new, old) for new, old in pairs if not _agree(new, old)), None)
        if wrong is not None:
            now, noted = map(_said, wrong)
            how = "keep dtype and shape of what you replace, or renew what its readers say by passes.graph.fake_again"
            yield f"{node.name} of {place_of(node)} makes {now} now, and its meta['val'] says {noted}: {how}"


def _same(before: tuple[Any, ...] | None, now: tuple[Any, ...]) -> bool:
    """Whether a call is the one that it was, down to the object that tells its value."""
    return before is not None and before[3] is now[3] and before[0] is now[0] and before[1:3] == now[1:3]


def _same_value(before: Calls, after: Calls, node: Node) -> bool:
    known = before.get(node)
    return known is not None and node in after and known[3] is after[node][3]


def _agree(made: Any, said: Any) -> bool:
    if not isinstance(made, torch.Tensor) or not isinstance(said, torch.Tensor):
        return isinstance(made, torch.Tensor) == isinstance(said, torch.Tensor)
    if made.dtype != said.dtype or made.ndim != said.ndim:
        return False
    sizes = zip(made.shape, said.shape, strict=True)
    return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _said(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
