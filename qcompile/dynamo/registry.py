"""The graphs that the back end has compiled, found by the models that they run."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from qcompile.dynamo.compiled import CompiledGraph
from qcompile.dynamo.packed import inner_tensors
from qcompile.errors import CompileError

if TYPE_CHECKING:
    from qcompile.dynamo.explain import CompileReport

# graph that Dynamo can call -> (order, its reports)
_KNOWN: weakref.WeakKeyDictionary[CompiledGraph, tuple[int, list[CompileReport]]] = weakref.WeakKeyDictionary()
_count = 0


def remember(graph: CompiledGraph, reports: list[CompileReport]) -> None:
    """Keep `graph` in the registry for as long as Dynamo keeps it."""
    global _count
    _count += 1
    _KNOWN[graph] = (_count, reports)


def graphs_of(compiled: Callable[..., Any] | None) -> dict[CompiledGraph, list[CompileReport]]:
    """The graphs of a compiled model or function and their reports, in the order in which they were compiled.

    Args:
        compiled: what `torch.compile` returned, a module or function that it was made of, or None for all.

    Raises:
        CompileError: there is none.
    """
    known = [(*entry, graph) for graph, entry in _KNOWN.items() if graph.is_used()]
    if compiled is not None:
        wanted = set(map(id, _tensors(compiled)))
        known = [k for k in known if any(id(weight) in wanted for weight in k[2].weights())]
    if not known:
        raise CompileError(
            "nothing was compiled by backend='qcompile' for this: call it once first; a function is found by the"
            " modules that it refers to"
        )
    return {graph: reports for _, reports, graph in sorted(known, key=lambda k: k[0])}


def refresh(compiled: Callable[..., Any] | None = None) -> None:
    """Make the codes of weights again at the next call, without compiling again.

    Weights that were replaced or written to are seen without it, but for writes that torch does not count:
    `weight.data.mul_(2)`, `weight.data += delta` (as some adapters are merged), and through NumPy or DLPack.

    Args:
        compiled: what `torch.compile(..., backend="qcompile")` returned; None for all.

    Raises:
        CompileError: nothing was compiled for it yet.
    """
    for graph in graphs_of(compiled):
        graph.forget()


def _tensors(compiled: Any) -> Iterator[torch.Tensor]:
    """The parameters and buffers of a module, or of the modules that a function refers to, plain ones."""
    original = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    if isinstance(original, torch.nn.Module):
        modules = [original]
    else:
        found = inspect.getclosurevars(inspect.unwrap(original))
        values = [*found.nonlocals.values(), *found.globals.values(), getattr(original, "__self__", None)]
        modules = [value for value in values if isinstance(value, torch.nn.Module)]
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            yield from inner_tensors(tensor)
