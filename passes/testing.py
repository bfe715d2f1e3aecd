"""How a pass is tested, ours and those of others: `rewrites`, `declines`, and graphs as text.

>>> def add_one(x):
...     return x + 1
>>> rewrites(MyPass, add_one, torch.randn(3), second_user=True, dynamic={"x": 0}, after='''
...     x: f32[3]
...     mul = mul.Tensor(x, 2): f32[3]
...     return mul
... ''')

Each captures the function or module itself, or takes a graph that is captured; an AssertionError shows the graph.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passes.base import Pass, PassLog, run_checked, run_pipeline
from passes.compat import FakeTensorMode
from passes.errors import PassError
from passes.functional import functional
from passes.graph import Emitter
from passes.program import unlift
from passes.subgraphs import copied_graph
from passes.text import graph_diff, graph_text

__all__ = [
    "DYNAMIC",
    "blank",
    "count",
    "declines",
    "graph_of",
    "graph_text",
    "only_call",
    "returns",
    "rewrites",
    "run",
]

DYNAMIC = Dim.DYNAMIC
Make = Callable[[], Pass]
Subject = GraphModule | Callable[..., Any]
Dynamic = Mapping[str | int, int | tuple[int, ...]]


def graph_of(
    subject: Callable[..., Any],
    *args: Any,
    dynamic: Dynamic | None = None,
    normalized: bool = False,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> GraphModule:
    """The graph that passes see of a function or module: ATen, functional, weights as `get_attr`, flat inputs.

    Args:
        args, kwargs: example inputs.
        dynamic: argument, by name or position -> the axis or axes of it that have any size.
        normalized: run `passes.NORMALIZE` on it, as in front of every pass behind that stage.
        dynamic_shapes: as of torch.export, where `dynamic` does not reach.
    """
    module = subject if isinstance(subject, nn.Module) else _as_module(subject)
    if dynamic is not None:
        dynamic_shapes = _shapes(module, args, kwargs, dynamic)
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        gm = unlift(functional(program))
    if normalized:
        from passes.pipelines import NORMALIZE

        run_pipeline(NORMALIZE, gm)
    return gm


def rewrites(
    make: Make,
    subject: Subject,
    *inputs: Any,
    fired: int = 1,
    before: str | None = None,
    after: str | None = None,
    second_user: bool | Callable[..., Any] = False,
    dynamic: Dynamic | None = None,
    normalized: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> PassLog:
    """Run the pass that `make` makes on `subject` and check what every pass promises; the log of the run.

    It fires `fired` times, the values stay within `rtol` and `atol` (bit for bit if neither is given), every node has
    right metadata, inputs and outputs stay, and a second run changes nothing.

    Args:
        subject: a function or module, or a graph, which is changed in place.
        before, after: the text that the graph has to have (`graph_text(gm, stable=True)`); its indentation is free.
        second_user: once more for each tensor in between that something else reads, too, or for those of one operator:
            the pass rewrites or declines, and all values stay. Where nothing is in between, the results are returned
            once more.
        dynamic: once more with these axes dynamic, as of `graph_of`; it fires there, too, also for larger inputs.
        normalized: as of `graph_of`.
    """
    tolerance = {"rtol": rtol, "atol": atol}
    gm = _captured(subject, inputs, None, normalized)
    _expect("before", before, gm)
    log = _rewritten(make, gm, [inputs], fired, tolerance, run(gm, *inputs))
    _expect("after", after, gm)
    if second_user is not False:
        gm = gm if isinstance(subject, GraphModule) else _captured(subject, inputs, None, normalized)
        for node, shared in _shared(gm, second_user):
            _rewritten(make, shared, [inputs], None, tolerance, run(shared, *inputs), f"where {node} has a second user")
    if dynamic is not None:
        gm = _captured(subject, inputs, dynamic, normalized)
        sizes = [inputs, _larger(subject, inputs, dynamic)]
        expected = [value for given in sizes for value in run(gm, *given)]
        _rewritten(make, gm, sizes, fired, tolerance, expected, "where sizes are dynamic")
    return log


def declines(
    make: Make,
    subject: Subject,
    *inputs: Any,
    reason: str | None = None,
    second_user: bool | Callable[..., Any] = False,
    dynamic: Dynamic | None = None,
    normalized: bool = False,
) -> list[str]:
    """Run the pass on a graph that it has to leave alone; its reasons.

    Args:
        reason: a regular expression that one of them has to match.
        second_user: with a second user, as of `rewrites`, for which it declines.
        others: as of `rewrites`.
    """
    gm = _captured(subject, inputs, dynamic, normalized)
    graphs = [gm] if second_user is False else [shared for _, shared in _shared(gm, second_user)]
    reasons: list[str] = []
    for each in graphs:
        text, instance = graph_text(each), make()
        instance(each)
        name, now = instance.name, graph_text(each)
        assert not instance.log.fired.total(), f"{name} fired, and had to decline:\n{graph_diff(text, now)}"
        assert now == text, f"{name} says that it changed nothing, and changed\n{graph_diff(text, now)}"
        reasons += [decline.reason for decline in instance.log.declined]
    if reason is not None:
        told = "\n".join(reasons) or "nothing"
        matches = any(re.search(reason, found) for found in reasons)
        assert matches, f"no reason matches {reason!r}; it said\n{told}\nof\n{graph_text(graphs[0])}"
    return reasons


def run(gm: GraphModule, *inputs: Any) -> list[Tensor]:
    """The outputs of `gm`, with the metadata of every node checked on the way. Inputs can be lists and the like."""
    with torch.no_grad():
        return pytree.tree_leaves(CheckedInterpreter(gm).run(*pytree.tree_leaves(inputs)))


def count(gm: GraphModule, *targets: Any) -> int:
    """How many calls of `targets` the graph holds."""
    return sum(node.op == "call_function" and node.target in targets for node in gm.graph.nodes)


def only_call(gm: GraphModule, target: Any) -> Node:
    """The one call of `target` in the graph."""
    found: list[Node] = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is target]
    assert len(found) == 1, f"{len(found)} calls of {target} in\n{graph_text(gm)}"
    return found[0]


def blank(*inputs: Tensor) -> tuple[GraphModule, Emitter, list[Node]]:
    """A graph of `inputs` that returns nothing, what adds calls to it, and its placeholders: without an export."""
    graph, mode = Graph(), FakeTensorMode()
    placeholders = [graph.placeholder(f"x{index}") for index in range(len(inputs))]
    for node, tensor in zip(placeholders, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    emit = Emitter(graph.output(()))
    return GraphModule(nn.Module(), graph), emit, placeholders


def returns(gm: GraphModule, *results: Node) -> GraphModule:
    """`gm`, which returns `results` now."""
    gm.graph.output_node().args = (results,)
    gm.recompile()
    return gm


class CheckedInterpreter(Interpreter):
    """Runs a graph and compares what each node makes with its `meta["val"]`."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "get_attr") and isinstance(result, Tensor):
            fake = n.meta["val"]
            assert fake.dtype == result.dtype, f"{n}: meta says {fake.dtype}, made {result.dtype}"
            assert len(fake.shape) == result.ndim, f"{n}: meta says {fake.shape}, made {result.shape}"
            for said, made in zip(fake.shape, result.shape, strict=True):
                assert not isinstance(said, int) or said == made, f"{n}: meta says {fake.shape}, made {result.shape}"
        assert n.op != "call_function" or "nn_module_stack" in n.meta, f"{n} belongs to no module"
        return result


def _rewritten(
    make: Make,
    gm: GraphModule,
    sizes: list[tuple[Any, ...]],
    fired: int | None,
    tolerance: Mapping[str, float],
    expected: list[Tensor],
    where: str = "",
) -> PassLog:
    """Run the pass on `gm` and check its promises; `fired` None allows it to decline."""
    text, first = graph_text(gm), make()
    constants = dict(gm.state_dict(keep_vars=True))
    first.is_checked = True
    try:
        run_checked(first, gm, requires=False)  # a test has its own reasons to leave a stage out
    except PassError as error:
        raise AssertionError(f"{error} {where}\n\nthe graph before it:\n{text}") from error
    found, name = first.log.fired[first.name], first.name
    if fired is not None and found != fired:
        reasons = "".join(f"\n  declined: {decline.reason}" for decline in first.log.declined)
        changed = graph_diff(text, graph_text(gm)) or text
        raise AssertionError(f"{name} fired {found} times instead of {fired} {where}{reasons}\n\n{changed}")
    did_nothing = graph_text(gm) == text and _is_same(constants, gm.state_dict(keep_vars=True))
    assert not found or not did_nothing, f"{name} fired, and changed nothing {where}:\n{text}"
    got = [value for given in sizes for value in run(gm, *given)]
    try:
        assert len(got) == len(expected), f"{len(expected)} outputs have become {len(got)}"
        for made, want in zip(got, expected, strict=True):
            torch.testing.assert_close(made, want, rtol=tolerance["rtol"], atol=tolerance["atol"], equal_nan=True)
    except AssertionError as error:
        raise AssertionError(f"{name} changes values {where}: {error}\n\n{graph_diff(text, graph_text(gm))}") from error
    text, state = graph_text(gm), set(gm.state_dict())
    again = make()
    again(gm)
    changed = graph_diff(text, graph_text(gm), ("after the first run", "after the second"))
    assert not changed, f"a second run of {name} changes the graph {where}:\n{changed}"
    told = f"a second run of {name} fires, and changes nothing {where}: fire where something was left to do\n{text}"
    assert not again.log.fired.total(), told
    assert set(gm.state_dict()) == state, f"a second run of {name} changes the constants {where}"
    return first.log


def _is_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether these are the same constants: a pass can have put another tensor in the place of one."""
    return before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def _captured(subject: Subject, inputs: tuple[Any, ...], dynamic: Dynamic | None, normalized: bool) -> GraphModule:
    if isinstance(subject, GraphModule):
        if dynamic is not None or normalized:
            raise TypeError("a graph is captured already: give the function or module for other sizes or a normal form")
        return subject
    return graph_of(subject, *inputs, dynamic=dynamic, normalized=normalized)


def _expect(when: str, wanted: str | None, gm: GraphModule) -> None:
    if wanted is not None:
        wanted, found = textwrap.dedent(wanted).strip(), graph_text(gm, stable=True)
        told = f"the graph {when} is another one:\n{graph_diff(wanted, found, ('expected', 'found'))}\n\n{found}"
        assert wanted == found, told


def _shared(gm: GraphModule, which: bool | Callable[..., Any]) -> Iterator[tuple[str, GraphModule]]:
    """Copies of `gm`, each with one more output: a tensor in between, or a result if there is none."""
    results = pytree.tree_leaves(gm.graph.output_node().args)
    between = [n for n in gm.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    chosen = [n for n in between if n not in results and (which is True or n.target is which)]
    if which is True and not chosen:
        chosen = [n for n in between if n in results]
    assert chosen, f"nothing in between to give a second user to:\n{graph_text(gm)}"
    for node in chosen:
        copies: dict[Node, Node] = {}
        shared = copied_graph(gm, copies)
        yield node.name, returns(shared, *(copies.get(r, r) for r in results), copies[node])


def _as_module(function: Callable[..., Any]) -> nn.Module:
    module = nn.Module()
    module.forward = function
    return module


def _bound(subject: Subject, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    called = subject.forward if isinstance(subject, nn.Module) else subject
    return dict(inspect.signature(called).bind(*args, **kwargs).arguments)


def _axes(arguments: Mapping[str, Any], dynamic: Dynamic) -> dict[str, tuple[int, ...]]:
    """The dynamic axes of each argument, counted from the first.

    Raises:
        TypeError: there is no such argument, or no tensor in it that has the axis.
    """
    names, found = list(arguments), dict[str, tuple[int, ...]]()
    for key, given in dynamic.items():
        name = names[key] if isinstance(key, int) and -len(names) <= key < len(names) else key
        if not isinstance(name, str) or name not in arguments:
            raise TypeError(f"no argument is called {name}; there are {', '.join(names)}")
        axes = (given,) if isinstance(given, int) else tuple(given)
        tensors = [leaf for leaf in pytree.tree_leaves(arguments[name]) if isinstance(leaf, Tensor)]
        least = min((tensor.ndim for tensor in tensors), default=0)
        if wrong := [axis for axis in axes if not -least <= axis < least]:
            raise TypeError(f"{name} has {least} axes, and no axis {wrong[0]} that could be dynamic")
        found[name] = tuple(axis % least for axis in axes)
    return found


def _shapes(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic) -> dict[str, Any]:
    arguments = _bound(module, args, kwargs)
    axes = _axes(arguments, dynamic)

    def sizes(name: str, leaf: Any) -> dict[int, Any] | None:
        return dict.fromkeys(axes[name], DYNAMIC) if name in axes and isinstance(leaf, Tensor) else None

    return {name: pytree.tree_map(partial(sizes, name), value) for name, value in arguments.items()}


def _larger(subject: Subject, inputs: tuple[Any, ...], dynamic: Dynamic) -> tuple[Any, ...]:
    """`inputs`, one longer in each dynamic axis."""
    arguments = _bound(subject, inputs, {})
    for name, axes in _axes(arguments, dynamic).items():
        for axis in axes:
            arguments[name] = pytree.tree_map_only(Tensor, partial(_longer, axis), arguments[name])
    return tuple(arguments.values())


def _longer(axis: int, tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
