"""What every pass promises, checked on a graph: around passes of a user, and around all where somebody asks for it.

`QCOMPILE_CHECK=1` asks for a process, `with passes.checked()` for what runs in it; the tests of this package do. A pass
adds what it says under *Requires* and *Ensures* by `Pass.check_requires` and `Pass.check_ensures`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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
    """What a graph is like before a pass, or after it.

    Attributes:
        text: of the graph.
        nodes: of it and of those in its calls -> what is missing in the metadata of each.
        inputs, outputs: names; sizes and dtypes.
        needed: for each output the inputs that it depends on.
    """

    text: str
    nodes: dict[Node, list[str]]
    inputs: list[str]
    outputs: list[Any]
    needed: list[set[str]]

    @classmethod
    def of(cls, gm: GraphModule) -> Seen:
        nodes = {node: _missing(gm, node) for part in graphs(gm) for node in part.graph.nodes}
        inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        return cls(graph_text(gm), nodes, inputs, _results(gm), _needed(gm))


def broken(before: Seen, after: Seen, fired: bool, *, keeps_dtypes: bool = True) -> Iterator[str]:
    """What of the promises of every pass does not hold, a sentence each.

    Args:
        keeps_dtypes: False for a pass whose purpose are other dtypes at the boundary.
    """
    if not fired:
        if before.text != after.text:
            yield f"it changed the graph and did not say so by `fire`:\n{graph_diff(before.text, after.text)}"
        return
    for node, missing in after.nodes.items():
        if missing and node not in before.nodes:
            told = " and ".join(f"meta[{key!r}]" for key in missing)
            how = "calls by passes.graph.Emitter and constants by passes.constants.add_constant"
            yield f"node {node.name} has no {told}: add {how}, which fill it in"
    if after.inputs != before.inputs:
        yield f"the inputs were {', '.join(before.inputs)} and are {', '.join(after.inputs)}"
    if len(after.outputs) != len(before.outputs):
        yield f"there were {len(before.outputs)} outputs, and are {len(after.outputs)}"
        return
    for index, (was, now) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        if len(was[0]) != len(now[0]) or (keeps_dtypes and was[1] != now[1]):
            yield f"output {index} was {was[1]} of {len(was[0])} axes, and is {now[1]} of {len(now[0])}"
        elif any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(was[0], now[0], strict=True)):
            yield f"output {index} had the shape {list(was[0])}, and has {list(now[0])}"
    for index, lost in enumerate(a - b for a, b in zip(before.needed, after.needed, strict=True)):
        if lost:
            yield f"output {index} no longer depends on {', '.join(sorted(lost))}"


def _missing(gm: GraphModule, node: Node) -> list[str]:
    """What `node` does not say of itself, and passes and messages read."""
    if node.op == "call_function":
        return [key for key in ("val", "nn_module_stack") if key not in node.meta]
    if node.op != "get_attr" or "val" in node.meta:
        return []
    owner = node.graph.owning_module or gm
    return [] if isinstance(getattr(owner, str(node.target), None), torch.nn.Module) else ["val"]


def _results(gm: GraphModule) -> list[tuple[Any, Any]]:
    """Sizes and dtype of each output."""
    values = [n.meta.get("val") if isinstance(n, Node) else n for n in pytree.tree_leaves(gm.graph.output_node().args)]
    return [(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else ((), type(v)) for v in values]


def _needed(gm: GraphModule) -> list[set[str]]:
    results = gm.graph.output_node().args[0]
    return input_dependence(gm) if isinstance(results, list | tuple) else []
