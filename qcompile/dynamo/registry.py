"""The graphs that the back end has compiled, found by the models that they run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qcompile.dynamo.compiled import CompiledGraph
from qcompile.dynamo.models import modules_of, tensors_of
from qcompile.errors import CompileError

if TYPE_CHECKING:
    from qcompile.dynamo.explain import CompileReport


@dataclass
class Reported:
    """A report, and the weights that it is true of: a graph serves other modules of a class, under other names."""

    report: CompileReport
    weights: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)

    def add(self, weights: Iterable[Tensor]) -> None:
        self.weights.update({id(weight): weakref.ref(weight) for weight in weights})

    def is_of(self, wanted: Collection[int]) -> bool:
        return not self.weights or any(key in wanted and ref() is not None for key, ref in self.weights.items())


# graph that Dynamo can call -> (order, its reports)
_KNOWN: weakref.WeakKeyDictionary[CompiledGraph, tuple[int, list[Reported]]] = weakref.WeakKeyDictionary()
_count = 0


def remember(graph: CompiledGraph, reports: list[Reported]) -> None:
    """Keep `graph` in the registry for as long as Dynamo keeps it."""
    global _count
    _count += 1
    _KNOWN[graph] = (_count, reports)


def graphs_of(compiled: Callable[..., Any] | None) -> dict[CompiledGraph, list[CompileReport]]:
    """The graphs of a compiled model or function and their reports, in the order in which they were compiled.

    Args:
        compiled: what `torch.compile` returned, a module or function that it was made of, or None for all.

    Raises:
        TypeError: it is nothing that can be compiled.
    """
    known = sorted(((*entry, graph) for graph, entry in _KNOWN.items() if graph.is_used()), key=lambda k: k[0])
    if compiled is None:
        return {graph: [reported.report for reported in reports] for _, reports, graph in known}
    wanted = {id(tensor) for module in modules_of(compiled).values() for tensor in tensors_of(module)}
    return {
        graph: [reported.report for reported in reports if reported.is_of(wanted)]
        for _, reports, graph in known
        if any(id(weight) in wanted for weight in graph.weights())
    }


def nothing_compiled() -> CompileError:
    """What to say where there is no graph."""
    return CompileError(
        "nothing was compiled by backend='qcompile' for this: call it once first; a function is found by the"
        " modules that it refers to"
    )


def refresh(compiled: Callable[..., Any] | None = None) -> None:
    """Make the codes of weights again at the next call, without compiling again.

    Weights that were replaced or written to are seen without it, but for writes that torch does not count:
    `weight.data.mul_(2)`, `weight.data += delta` (as some adapters are merged), and through NumPy or DLPack.

    Args:
        compiled: what `torch.compile(..., backend="qcompile")` returned; None for all.

    Raises:
        CompileError: nothing was compiled for it yet.
    """
    graphs = graphs_of(compiled)
    if not graphs:
        raise nothing_compiled()
    for graph in graphs:
        graph.forget()
