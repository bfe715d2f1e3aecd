"""State that a program is given and gives back: caches of keys and values, read off the graph.

A program keeps nothing between calls. Its state goes in as an input and comes out, longer or written to, as an output;
who calls it hands the one to the next call as the other. Nothing but the graph says which are a pair, so that a program
that was saved, or that somebody else wrote, has them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from passes.constants import LAYOUT
from passes.graph import TRANSPARENT, argument, aten, calls, is_call, shape, strip, val
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA, SOFTMAXES

__all__ = [
    "UPDATES",
    "State",
    "Write",
    "cache_kind",
    "new_of",
    "past_of",
    "states",
    "stored_format",
    "updated",
    "writes",
]

Kind = Literal["k", "v"]

# What stands between a cache and its input or output: other forms of the same numbers.
_SAME = (*TRANSPARENT, aten._to_copy.default, QUANTIZE, DEQUANTIZE)
# What stands between a cache and the product that reads it: heads are repeated, axes moved, and casts.
_ON_THE_WAY = (
    *LAYOUT,
    *_SAME,
    aten.expand.default,
    aten.slice.Tensor,
    aten.repeat_interleave.self_int,
    aten.mul.Tensor,
)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_WRITES = {
    aten.index_copy.default: 3,
    aten.index_put.default: 2,
    aten.slice_scatter.default: 1,
}
"""What writes something new over a part of its first argument, and which argument that is."""
UPDATES = (aten.cat.default, *_WRITES)
"""What makes state of state."""


@dataclass(frozen=True)
class State:
    """One piece of state.

    Attributes:
        past: the input. update: the call that makes what is given back: `cat([past, new], axis)`, or a write into
            `past`: `index_copy(past, axis, positions, new)`. index: which output.
    """

    past: Node
    update: Node
    index: int

    @property
    def new(self) -> tuple[Node, ...]:
        """What is appended or written."""
        return new_of(self.update)

    @property
    def is_written(self) -> bool:
        """Whether the state has a fixed size that is written into, and does not grow."""
        return is_call(self.update, *_WRITES)


def states(graph: Graph) -> Iterator[State]:
    """The pieces of state of a graph, in the order of its outputs."""
    for index, value in enumerate(graph.output_node().args[0]):  # type: ignore[arg-type]
        if isinstance(value, Node) and (past := past_of(update := strip(value, *_SAME))) is not None:
            yield State(past, update, index)


def new_of(update: Node) -> tuple[Node, ...]:
    """What `update` appends or writes."""
    if is_call(update, *_WRITES):
        return (update.args[_WRITES[update.target]],)  # type: ignore[index,return-value]
    return tuple(update.args[0][1:])  # type: ignore[index,arg-type]


def updated(update: Node, past: Node, new: Sequence[Node]) -> tuple[Any, tuple[Any, ...]]:
    """The call of `update` with `past` and `new` in the place of its own, one that torch has in every dtype."""
    if is_call(update, aten.index_copy.default):  # index_copy has none for FP8
        axis, positions = int(argument(update, "dim")) % len(shape(update)), argument(update, "index")
        return aten.index_put.default, (past, [*[None] * axis, positions], new[0])
    if not is_call(update, *_WRITES):
        return update.target, ([past, *new], *update.args[1:])
    args = list(update.args)
    args[0], args[_WRITES[update.target]] = past, new[0]  # type: ignore[index]
    return update.target, tuple(args)


@dataclass(frozen=True)
class Write:
    """A write of whole slices into state.

    Attributes:
        node: the call. past: what it writes into. new: the slices, `n` of them along `axis`.
        at: where: positions `[n]`, or the first of a row of them, which is a number or a size.
    """

    node: Node
    past: Node
    new: Node
    axis: int
    at: int | Node

    @property
    def trailing(self) -> int:
        """How many axes follow `axis`."""
        return len(shape(self.past)) - self.axis - 1


def writes(graph: Graph) -> Iterator[Write]:
    """The writes of whole slices into inputs that are given back (safe to edit while iterating)."""
    for node in calls(graph, *_WRITES):
        if past_of(node) is not None and is_returned(node) and (found := _place(node)) is not None:
            past, (new,) = node.args[0], new_of(node)
            assert isinstance(past, Node)
            yield Write(node, past, new, found[0] % len(shape(past)), found[1])


def _place(node: Node) -> tuple[int, int | Node] | None:
    """The axis of a write, and where along it; None for one of other forms."""
    if is_call(node, aten.slice_scatter.default):
        start = argument(node, "start") or 0
        forward = argument(node, "step") == 1 and (isinstance(start, Node) or start >= 0)
        return (argument(node, "dim"), start) if forward else None
    if is_call(node, aten.index_copy.default):
        axis, positions = argument(node, "dim"), argument(node, "index")
    else:
        *before, positions = argument(node, "indices")
        axis = len(before)
        if any(index is not None for index in before) or val(positions).dtype not in (torch.int64, torch.int32):
            return None
    return (axis, positions) if len(shape(positions)) == 1 else None


def past_of(update: Node) -> Node | None:
    """The input that `update` appends to, `cat([past, new, ...], axis)`, or writes into; None for another node."""
    if is_call(update, *_WRITES):
        first = None if is_call(update, aten.index_put.default) and argument(update, "accumulate") else update.args[0]
    elif is_call(update, aten.cat.default):
        parts = update.args[0]
        first = parts[0] if isinstance(parts, (list, tuple)) and len(parts) > 1 else None
    else:
        return None
    past = strip(first, *_SAME) if isinstance(first, Node) else None
    return past if past is not None and past.op == "placeholder" and len(shape(past)) > 1 else None


def stored_format(update: Node) -> str | None:
    """Name of the format that a cache is kept in, whose codes `update` appends, or whose values it does before they are
    quantized; None for one in floating point."""
    for node in (*new_of(update)[-1:], *update.users):
        if is_call(node, QUANTIZE):
            return str(node.kwargs["format"])
    return None


def is_returned(node: Node) -> bool:
    """Whether `node` is an output of its graph, perhaps in another form of the same numbers."""
    return any(user.op == "output" or (is_call(user, *_SAME) and is_returned(user)) for user in node.users)


def cache_kind(update: Node) -> Kind | None:
    """Whether what `update` makes is a cache of keys or of values of an attention; None if it is no cache."""
    if past_of(update) is None or not is_returned(update):
        return None
    seen, pending = {update}, [update]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_call(user, SDPA, ATTENTION):
                found = [operand for operand, arg in zip(("q", "k", "v"), user.args, strict=False) if arg is node]
                return "v" if found == ["v"] else "k" if "k" in found else None
            if is_call(user, *_PRODUCTS):
                return "v" if _is_softmax(user.args[0]) else "k"
            if is_call(user, *_ON_THE_WAY) and user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def _is_softmax(node: object) -> bool:
    """Whether `node` holds probabilities, perhaps cast, cut or rearranged since."""
    while isinstance(node, Node) and not is_call(node, *SOFTMAXES):
        if not is_call(node, *_ON_THE_WAY) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return isinstance(node, Node)
