"""Weights that are tensor subclasses of torchao: codes and scales in a wrapper, one argument of Dynamo's.

Dynamo's graph says `linear(x, weight, bias)`. Here it gets a placeholder for each tensor in the weight, behind those
that it has, and the operators that `import_quantized` captures for such a layer. Its tensors are read from the weight
when a graph is bound, not at each call: CompiledGraph compares the tensors inside of the wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile.compat.dynamo import set_source
from qcompile.compat.dynamo import source as source_of_node
from qcompile.compat.torch import is_traceable_wrapper_subclass, linear_of_graphs
from qcompile.dynamo.names import source_of
from qcompile.errors import CompileError
from qcompile.frontends import torchao

_LINEAR = (torch.nn.functional.linear, linear_of_graphs())


@dataclass(frozen=True)
class Packed:
    """A weight among Dynamo's arguments.

    Attributes:
        position: of the weight.
        layer: whose weight it is.
        form: what has to stay for the graph to be right: how it is quantized, and the names of its tensors.
    """

    position: int
    layer: str
    form: tuple[Any, ...]

    def tensors(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of the weight that Dynamo calls with now, in the order of their placeholders."""
        form, tensors = _read(weight, self.layer)
        if form != self.form:
            raise CompileError(
                f"{self.layer}: the weight is quantized in another way than when it was compiled: call"
                " torch._dynamo.reset() and compile again"
            )
        return list(tensors.values())


def inner_tensors(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a subclass wraps."""
    if not is_traceable_wrapper_subclass(weight):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from inner_tensors(getattr(weight, name))


def unpack(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[Packed], list[torch.Tensor]]:
    """`gm` with a placeholder for each tensor of the weights that are subclasses, at its end, and those tensors.

    Raises:
        CompileError, CaptureError: name the layer whose weight is of another subclass, or no linear layer's.
    """
    packed: list[Packed] = []
    tensors: list[torch.Tensor] = []
    if not any(isinstance(v, torch.Tensor) and is_traceable_wrapper_subclass(v) for v in example_inputs):
        return gm, packed, tensors
    gm = _copy(gm)  # Dynamo reads its own graph afterwards
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        weight = example_inputs[position]
        if not isinstance(weight, torch.Tensor) or not is_traceable_wrapper_subclass(weight):
            continue
        source = source_of(node)
        owner = source.rpartition(".")[0]
        layer = owner.partition(".")[2] or owner
        if not torchao.is_subclass(weight):
            raise CompileError(
                f"{source} is a {type(weight).__name__}: of tensor subclasses, qcompile compiles those of"
                " torchao's quantize_"
            )
        form, found = _read(weight, layer)
        packed.append(Packed(position, layer, form))
        placeholders = [_placeholder(gm.graph, node, f"{owner}.{name}") for name in found]
        for user in list(node.users):
            _replace(gm, user, node, weight, placeholders, layer)
        tensors += found.values()
    return gm, packed, tensors


def _copy(gm: GraphModule) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        if (found := source_of_node(node)) is not None:
            set_source(copied[node], found)
    return GraphModule(gm, graph)


def _read(weight: torch.Tensor, layer: str) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    module = torchao.layer_of(weight, None, layer)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return (module.scheme, tuple(tensors)), tensors


def _placeholder(graph: Graph, weight: Node, source: str) -> Node:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(source.replace(".", "_"))
    node.meta = {"tensor_dict": weight.meta.get("tensor_dict", {})}
    set_source(node, SimpleNamespace(name=source))
    return node


def _replace(
    gm: GraphModule, node: Node, packed: Node, weight: torch.Tensor, tensors: Sequence[Node], layer: str
) -> None:
    """Write what the layer computes of its tensors in the place of `node`, which gives its weight to a function."""
    arguments = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    if node.target not in _LINEAR or arguments["weight"] is not packed:
        raise CompileError(
            f"{layer}: a weight of torchao, {type(weight).__name__}, is given to {node.target}; qcompile compiles its"
            " linear layers"
        )
    bias = arguments.get("bias")
    module = torchao.layer_of(weight, None if bias is None else torch.empty(0), layer).to("meta")
    gm.add_submodule(name := f"qcompile_{node.name}", _Linear(module))
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(name, (arguments["input"], bias, *tensors))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


class _Linear(torch.nn.Module):
    """A quantized layer as a function of its tensors."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
        self.names = [name for name in names if name != "bias"]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        if bias is not None:
            named["bias"] = bias
        result: torch.Tensor = torch.func.functional_call(self.layer, named, (x,))
        return result
