"""Dynamo's graph as the functional ATen graph that passes read: linear and attention whole, weights as `get_attr`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.amp import autocast
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from passes.compat import FakeTensorMode, LazyGraphModule
from passes.graph import aten
from passes.subgraphs import copied_graph
from qcompile.compat.torch import (
    FunctionalTensor,
    FunctionalTensorMode,
    TracingContext,
    enter_autocast,
    exit_autocast,
    functional_value,
    set_grad_enabled,
)
from qcompile.dynamo.names import STATIC, Naming, clean_stack, roots_of, weight_names
from qcompile.dynamo.packed import Packed, unpack
from qcompile.dynamo.untraced import named
from qcompile.frontends import modelopt

# What is recorded of the contexts that a model enters; the graph is for inference, and casts say what autocast did.
_CONTEXTS = (set_grad_enabled(), enter_autocast, exit_autocast)


@dataclass(frozen=True)
class Traced:
    """A graph that reads its weights by name, and where its arguments are among those that Dynamo calls with.

    Attributes:
        graph: functional but for `copy_` into inputs at its end; a weight is a `get_attr`.
        constants: tensors that the graph itself holds, by name.
        roots: the variables of the frame that hold modules; names begin with one of them until they are `named`.
        weights: name of a parameter or buffer -> position.
        inputs: position of each placeholder of `graph`: the inputs of the user, and sizes.
        autocast: whether fake values have dtypes that only autocast gives them.
    """

    graph: Graph
    constants: Mapping[str, Any]
    roots: set[str]
    weights: Mapping[str, int]
    inputs: Sequence[int]
    autocast: bool

    def named(self, naming: Naming) -> Traced:
        """A copy that passes can edit, with names as they are in the model."""
        graph = Graph()
        copied: dict[Node, Node] = {}
        weights: dict[str, int] = {}
        for node in self.graph.nodes:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            if stack := node.meta.get("nn_module_stack"):
                copied[node].meta["nn_module_stack"] = {
                    key: (naming(path), kind) for key, (path, kind) in stack.items()
                }
            if (position := self.weights.get(str(node.target))) is not None and node.op == "get_attr":
                name = naming(str(node.target)) or str(node.target)
                name = name if name not in weights else f"{name}_{position}"
                weights[name], copied[node].target = position, name
        return replace(self, graph=graph, weights=weights)

    def with_weights(self, tensors: Mapping[str, torch.Tensor]) -> GraphModule:
        """The graph with these weights; graphs in it are copies."""
        own = {n: copied_graph(c) if isinstance(c, GraphModule) else c for n, c in self.constants.items()}
        gm: GraphModule = LazyGraphModule({**own, **tensors}, self.graph)
        return gm


@dataclass(frozen=True)
class Captured:
    """What Dynamo hands to a back end.

    Attributes:
        gm: torch functions and methods; parameters and buffers are placeholders.
        fakes: for each placeholder a fake tensor, a symbolic size, or the real tensor that holds a Python number; None
            for a packed weight.
        scalars: positions of such numbers.
        packed: weights whose tensors have placeholders of their own, behind those that Dynamo calls with.
        fake_mode: what the fake tensors live in.
    """

    gm: GraphModule
    fakes: Sequence[Any]
    scalars: Sequence[int]
    packed: Sequence[Packed]
    fake_mode: FakeTensorMode

    @classmethod
    def read(cls, gm: GraphModule, example_inputs: Sequence[Any]) -> Captured:
        """Has to be called while Dynamo waits for the back end: only then its symbols are known."""
        modelopt.dynamo_ready()  # for the next time, if it was imported after this module
        context = TracingContext.get()
        assert context.fake_mode is not None
        nodes = gm.graph.find_nodes(op="placeholder")
        scalars = [i for i, node in enumerate(nodes) if _is_scalar(node, example_inputs[i])]
        gm, packed, tensors = unpack(gm, example_inputs)
        values = {**dict(enumerate((*example_inputs, *tensors))), **{weight.position: None for weight in packed}}
        fakes = [v if i in scalars else _fake(v, context) for i, v in values.items()]
        return cls(gm, fakes, scalars, packed, context.fake_mode)

    def unpacked(self, arguments: Sequence[Any]) -> list[Any]:
        """What Dynamo calls with, and the tensors of packed weights behind it."""
        return [*arguments, *(t for packed in self.packed for t in packed.tensors(arguments[packed.position]))]


def trace(captured: Captured, numbers: Sequence[Any]) -> Traced:
    """What Dynamo captured, as ATen operators before they are dispatched.

    AOTAutograd would split linear and attention, so tracing happens here, in Dynamo's own fake mode: symbolic sizes
    and module paths stay. Writing to tensors becomes functional; what is written to an input is copied to it at the
    end.

    Args:
        numbers: the value of each of `captured.scalars`.
    """
    known: dict[int, Any] = dict(zip(captured.scalars, map(_Number, numbers), strict=True))
    known.update((packed.position, None) for packed in captured.packed)
    arguments = [i for i in range(len(captured.fakes)) if i not in known]

    def run(*values: Any) -> Any:
        given = {**dict(zip(arguments, values, strict=True)), **known}
        return _functional(captured.gm, [given[i] for i in range(len(given))])

    with named(captured.gm), captured.fake_mode, preserve_node_meta(), torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(*(captured.fakes[i] for i in arguments))
    return _read(traced, captured, arguments)


class _Number:
    """A Python number that Dynamo hands over as a tensor, to be read by `item()`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value


def _is_scalar(node: Node, value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 0
        and value.device.type == "cpu"
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def _fake(value: Any, context: TracingContext) -> Any:
    """`value` in the fake mode of `context`, with the symbols that Dynamo gave to its sizes."""
    if not isinstance(value, torch.Tensor):
        return value
    assert context.fake_mode is not None
    contexts: Any = context.tensor_to_context
    symbols = contexts.get(value)
    if symbols is None:
        return context.fake_mode.from_tensor(value, static_shapes=True)
    source = getattr(symbols, "tensor_source", None)
    return context.fake_mode.from_tensor(value, symbolic_context=symbols, source=source)


class _Run(Interpreter):
    """Runs Dynamo's graph, entering autocast where the model does: when traced, that would only be noted.

    What activation checkpointing wraps becomes part of the graph: there is no backward to compute it again for.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is enter_autocast:
            context: Any = autocast(*args, **kwargs)
            context.__enter__()
            return context
        if target is exit_autocast:
            return args[0].__exit__(None, None, None)
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return _Run(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def _functional(gm: GraphModule, arguments: Sequence[Any]) -> Any:
    """The results of `gm`, without an operation in place but the last ones, into `arguments`."""
    with FunctionalTensorMode(pre_dispatch=True, export=True):  # for torch.export composite operators stay whole
        wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, list(arguments))
        results = pytree.tree_map_only(FunctionalTensor, _unwrapped, _Run(gm).run(*wrapped))
        after = pytree.tree_map_only(FunctionalTensor, _unwrapped, wrapped)
    for before, new in zip(arguments, after, strict=True):
        if isinstance(before, torch.Tensor) and new is not before:
            before.copy_(new)
    return results


def _unwrapped(tensor: FunctionalTensor) -> torch.Tensor:
    return functional_value(tensor.elem)


def _read(traced: GraphModule, captured: Captured, arguments: Sequence[int]) -> Traced:
    """`traced` with its weights as `get_attr` nodes of their dotted names."""
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    roots = roots_of(placeholders, traced.graph)
    names = weight_names(placeholders, captured.fakes)
    graph = Graph()
    copied: dict[Node, Node] = {}
    weights: dict[str, int] = {}
    inputs: list[int] = []
    for index, node in zip(arguments, traced.graph.find_nodes(op="placeholder"), strict=True):
        if index in names and not _is_written(node):
            weights[names[index]] = index
            copied[node] = graph.get_attr(names[index])
        else:
            inputs.append(index)
            copied[node] = graph.placeholder(placeholders[index].name)
        copied[node].meta = copy.copy(node.meta)
        if index in names:
            copied[node].meta.update(STATIC)
    constants: dict[str, Any] = {}
    for node in traced.graph.nodes:
        if node in copied or node.target in _CONTEXTS:
            continue
        if node.op == "get_attr":
            constants[str(node.target)] = getattr(traced, str(node.target))
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        clean_stack(copied[node])
    device = next((f.device.type for f in captured.fakes if isinstance(f, torch.Tensor)), "cpu")
    autocast_on = torch.is_autocast_enabled(device) or any(node.target is enter_autocast for node in traced.graph.nodes)
    return Traced(graph, constants, roots, weights, inputs, autocast_on)


def _is_written(node: Node) -> bool:
    """Whether the model writes to this input: a key/value cache, say, is no constant."""
    return any(user.target is aten.copy_.default and user.args[0] is node for user in node.users)


modelopt.dynamo_ready()  # torch.compile imports the back end, and so this, before Dynamo traces
