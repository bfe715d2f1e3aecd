"""A program that `torch.export` captured, made functional where it is not yet, and left alone elsewhere.

`ExportedProgram.run_decompositions({})` traces a whole program anew, which takes twice as long as the export, to change
a few operators: those in place, and those that are a view, a copy or nothing as the case may be (`reshape`, `to`,
`contiguous`). Here these alone are traced, each with the shapes that it has in the graph.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from passes.compat import FakeTensor, enable_python_dispatcher, is_composite, is_kept
from passes.graph import aten

__all__ = ["functional"]

# Their results are tensors of their own, however they are computed: nobody else sees what is written over them.
_FRESH = {
    aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose2d.input, aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default,
    aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip
_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


class _NotLocalError(Exception):
    """What one operator does cannot be told without the others: the whole program has to be traced."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """What `program.run_decompositions({})` gives: the same operators, in the same order."""
    try:
        _check(program)
        graph = _Copy(program.graph_module).run()
    except _NotLocalError:
        whole: ExportedProgram = program.run_decompositions({})
        return whole
    return _program(program, graph)


def _check(program: ExportedProgram) -> None:
    """Raises _NotLocalError for programs that write to their inputs, or whose tensors are more than tensors."""
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise _NotLocalError
    if any(spec.kind in (InputKind.TOKEN, InputKind.CUSTOM_OBJ) for spec in program.graph_signature.input_specs):
        raise _NotLocalError
    tensors = [*program.state_dict.values(), *program.constants.values()]
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        raise _NotLocalError


class _Copy:
    """A graph, copied with functional operators.

    Attributes:
        values: what each node became; of a tensor that was written to, what was written last.
        places: node -> all nodes that are the same tensor, by operators in place.
        sizes: the nodes of the copy that hold a size, by its expression.
        traced: what composite operators are made of, by their arguments.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.nodes = list(gm.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.graph = Graph()
        self.values: dict[Node, Any] = {}
        self.places: dict[Node, list[Node]] = {}
        self.sizes: dict[str, Node] = {}
        self.traced: dict[Any, GraphModule] = {}

    def run(self) -> Graph:
        for node in self.nodes:
            self.values[node] = value = self.copied(node)
            if isinstance(value, Node):
                self.sizes.setdefault(_expression(value), value)
        self.graph.eliminate_dead_code()
        return self.graph

    def copied(self, node: Node) -> Any:
        target = node.target
        if node.op == "get_attr" or isinstance(target, HigherOrderOperator):
            raise _NotLocalError  # graphs in calls
        if target is operator.getitem and isinstance(self.values[node.args[0]], (list, tuple)):  # type: ignore[index]
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if node.op != "call_function" or not isinstance(target, OpOverload):
            new = self.graph.node_copy(node, self.mapped)
            if node.op == "placeholder":
                new.name = node.name  # of the signature, also where Python has that name
            return new
        if target is aten.detach_.default:
            return self.mapped(node.args[0])  # type: ignore[arg-type]
        if target is aten.lift_fresh_copy.default:
            return self.renamed(node, aten.clone.default)
        if target._schema.is_mutable:
            return self.out_of_place(node, target)
        if _changes(target):
            return self.spliced(node)
        return self.renamed(node, target)

    def mapped(self, node: Node) -> Node:
        value = self.values[node]
        if not isinstance(value, Node):
            raise _NotLocalError
        return value

    def renamed(self, node: Node, target: OpOverload) -> Node:
        new = self.graph.node_copy(node, self.mapped)
        new.target = target
        positional = [argument for argument in target._schema.arguments if not argument.kwarg_only]
        while any(argument.name in new.kwargs for argument in positional[len(new.args) :]):  # as tracing has them
            argument, kwargs = positional[len(new.args)], dict(new.kwargs)
            new.args = (*new.args, kwargs.pop(argument.name, argument.default_value))
            new.kwargs = kwargs
        return new

    def out_of_place(self, node: Node, target: OpOverload) -> Node:
        """The functional form of an operator in place, whose result stands for what was written to from there on."""
        written = node.args[0]
        assert isinstance(written, Node)
        places = self.places.setdefault(written, [written])
        if not _is_fresh(places[0]):
            raise _NotLocalError
        readers = (user for place in places for user in place.users if user is not node and user not in places)
        if any(self.order[reader] < self.order[node] and not _reads(reader) for reader in readers):
            raise _NotLocalError  # which may hold on to what is written to
        new = self.renamed(node, _without_writing(node, target))
        self.places[node] = places
        places.append(node)
        for place in places:
            self.values[place] = new
        return new

    def spliced(self, node: Node) -> Any:
        """What `node` is made of, in its place."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        key = (node.target, spec, *(_key(leaf) for leaf in leaves))
        if key not in self.traced:
            self.traced[key] = _trace(node, leaves, spec)
        given = (self.mapped(leaf) for leaf in leaves if isinstance(leaf, Node))
        values: dict[Node, Any] = {}
        meta = {name: node.meta[name] for name in _META if name in node.meta}
        for part in self.traced[key].graph.nodes:
            if part.op == "placeholder":
                values[part] = next(given)
            elif part.op == "output":
                return map_arg(part.args[0], lambda n: values[n])
            elif (known := self.sizes.get(_expression(part))) is not None:
                values[part] = known
            else:
                values[part] = new = self.graph.node_copy(part, lambda n: values[n])
                new.meta = {"val": part.meta["val"], **meta}
                self.sizes.setdefault(_expression(new), new)
        raise AssertionError("a graph has an output")


def _expression(node: Node) -> Any:
    """What a size is, as a text; the node itself where it is none."""
    value = node.meta.get("val")
    return str(value) if isinstance(value, torch.SymInt) else node


def _changes(target: OpOverload) -> bool:
    """Whether tracing writes other operators for this one."""
    return is_composite(target) and not is_kept(target)


def _reads(node: Node) -> bool:
    """Whether `node` does nothing with its operands but read them."""
    target = node.target
    if target in _FRESH:
        return True
    if node.op != "call_function" or not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return not _changes(target) and all(argument.alias_info is None for argument in target._schema.arguments)


def _value(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and type(value) is not FakeTensor:
        raise _NotLocalError  # of vmap, which has ended
    return value


def _key(leaf: Any) -> Any:
    if not isinstance(leaf, Node):
        return type(leaf), leaf
    value = leaf.meta["val"]
    if isinstance(value, torch.Tensor):
        return tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, value.device
    return str(value)


def _trace(node: Node, leaves: list[Any], spec: pytree.TreeSpec) -> GraphModule:
    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Node) else leaf for leaf in leaves], spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with torch.no_grad(), enable_python_dispatcher():
        gm = make_fx(call)(*(_value(leaf) for leaf in leaves if isinstance(leaf, Node)))
    gm.graph.eliminate_dead_code()
    for part in gm.graph.nodes:
        if part.op == "call_function" and isinstance(part.target, OpOverload) and part.target._schema.is_mutable:
            raise _NotLocalError
        if part.op == "get_attr":
            raise _NotLocalError
    return gm


def _without_writing(node: Node, target: OpOverload) -> OpOverload:
    """The functional form of an operator in place."""
    _, name, overload = str(target).split(".")  # aten.add_.Tensor
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and target.namespace == "aten" else None
    found = getattr(packet, overload, None)
    if found is None:
        raise _NotLocalError
    args, kwargs = map_arg((node.args, node.kwargs), _value)
    with torch.no_grad():
        made, kept = found(*args, **kwargs), node.meta["val"]
    if (made.shape, made.dtype, made.stride()) != (kept.shape, kept.dtype, kept.stride()):
        raise _NotLocalError  # what was written is cast or laid out as what was there
    assert isinstance(found, OpOverload)
    return found


def _is_fresh(node: Node) -> bool:
    """Whether `node` makes a tensor that is nobody else's."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and _is_fresh(source) and [*map(_index, source.users)].count(_index(node)) == 1
    return node.target in _FRESH or (node.op == "call_function" and _reads(node))


def _index(node: Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


def _named(spec: OutputSpec, name: str) -> OutputSpec:
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=name))


def _program(program: ExportedProgram, graph: Graph) -> ExportedProgram:
    """`program` with another graph."""
    signature = program.graph_signature
    outputs = graph.output_node().args[0]
    specs = [
        _named(spec, value.name) if isinstance(value, Node) else spec
        for spec, value in zip(signature.output_specs, outputs, strict=True)  # type: ignore[arg-type]
    ]
    made = ExportedProgram(
        root={},  # graphs in calls are not local
        graph=graph,
        graph_signature=dataclasses.replace(signature, output_specs=specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )
    made.graph_module.meta.update(program.graph_module.meta)
    return made
