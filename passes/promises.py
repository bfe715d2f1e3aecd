"""What every pass promises, checked on a graph: around passes of a user, and around all where somebody asks for it.

`QCOMPILE_CHECK=1` asks for a process, `with passes.checked()` for what runs in it; the tests of this package do. A pass
adds what it says under *Requires* and *Ensures* by `Pass.check_requires` and `Pass.check_ensures`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.dependence import input_dependence
from passes.subgraphs import graphs
from passes.text import graph_diff, graph_text

__all__ = ["VARIABLE", "Seen", "broken", "checked", "checks"]

VARIABLE = "QCOMPILE_CHECK"
_asked: ContextVar[bool] = ContextVar("checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Check in the body what each pass of a pipeline requires and ensures: a PassError names one that breaks it."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def checks() -> bool:
    """Whether somebody asked for it."""
    return _asked.get() or os.environ.get(VARIABLE, "0") != "0"


@dataclass(frozen=True)
class Seen:
    """What a graph was like before a pass: its text, nodes, inputs, outputs, and which of these need which of those."""

    text: str
    nodes: frozenset[Node]
    inputs: list[str]
    outputs: list[Any]
    needed: list[set[str]]

    @classmethod
    def of(cls, gm: GraphModule) -> Seen:
        nodes = frozenset(node for part in graphs(gm) for node in part.graph.nodes)
        inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        return cls(graph_text(gm), nodes, inputs, _results(gm), _needed(gm))


def broken(before: Seen, gm: GraphModule, fired: bool, *, keeps_dtypes: bool = True) -> Iterator[str]:
    """What of the promises of every pass does not hold, a sentence each.

    Args:
        keeps_dtypes: False for a pass whose purpose are other dtypes at the boundary.
    """
    if not fired:
        if text := graph_diff(before.text, graph_text(gm)):
            yield f"it changed the graph and did not say so by `fire`:\n{text}"
        return
    new = [node for part in graphs(gm) for node in part.graph.nodes if node not in before.nodes]
    yield from _untold([node for node in new if node.op == "call_function"])
    yield from (f"constant {n.name} has no meta['val']" for n in new if n.op == "get_attr" and _is_bare(gm, n))
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    if inputs != before.inputs:
        yield f"the inputs were {', '.join(before.inputs)} and are {', '.join(inputs)}"
    results = _results(gm)
    if len(results) != len(before.outputs):
        yield f"there were {len(before.outputs)} outputs, and are {len(results)}"
        return
    for index, (was, now) in enumerate(zip(before.outputs, results, strict=True)):
        if len(was[0]) != len(now[0]) or (keeps_dtypes and was[1] != now[1]):
            yield f"output {index} was {was[1]} of {len(was[0])} axes, and is {now[1]} of {len(now[0])}"
        elif any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(was[0], now[0], strict=True)):
            yield f"output {index} had the shape {list(was[0])}, and has {list(now[0])}"
    for index, lost in enumerate(a - b for a, b in zip(before.needed, _needed(gm), strict=True)):
        if lost:
            yield f"output {index} no longer depends on {', '.join(sorted(lost))}"


def _untold(calls: Iterable[Node]) -> Iterator[str]:
    """New calls that say nothing of their values or their module, which passes and messages read."""
    for node in calls:
        missing = [key for key in ("val", "nn_module_stack") if key not in node.meta]
        if missing:
            told = " and ".join(f"meta[{key!r}]" for key in missing)
            yield f"node {node.name} has no {told}: add calls by passes.graph.Emitter, which fills it in"


def _is_bare(gm: GraphModule, node: Node) -> bool:
    owner = node.graph.owning_module or gm
    return "val" not in node.meta and not isinstance(getattr(owner, str(node.target), None), torch.nn.Module)


def _results(gm: GraphModule) -> list[tuple[Any, Any]]:
    """Sizes and dtype of each output."""
    values = [n.meta.get("val") if isinstance(n, Node) else n for n in pytree.tree_leaves(gm.graph.output_node().args)]
    return [(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else ((), type(v)) for v in values]


def _needed(gm: GraphModule) -> list[set[str]]:
    results = gm.graph.output_node().args[0]
    return input_dependence(gm) if isinstance(results, list | tuple) else []
