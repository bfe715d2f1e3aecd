"""ExportedProgram <-> the GraphModule that passes work on.

An ExportedProgram lifts weights to graph inputs and describes them in a signature beside the graph. Passes want them in
place: `unlift` makes every parameter, buffer and constant a `get_attr` node of one self-contained GraphModule, and
`lift` turns what a pipeline left of it back into an ExportedProgram of the same interface. The same goes for graphs in
calls.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from passes.compat import LazyGraphModule
from passes.constants import constant
from passes.errors import PassError
from passes.graph import TRANSPARENT, aten, strip
from passes.subgraph_constants import hoist_constants, sink_constants
from passes.subgraphs import copied_graph
from passes.symbols import separate

_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)
_PREFIX = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}


def written_tensors(program: ExportedProgram) -> list[str]:
    """Names of the buffers, parameters and inputs that a functional program writes to when it runs."""
    return [str(spec.target) for spec in program.graph_signature.output_specs if spec.kind in _MUTATIONS]


def drop_idle_writes(program: ExportedProgram) -> None:
    """Leave out what `program` writes to a buffer that is the buffer itself, moved or cast, in place.

    `self.table = self.table.to(x.dtype)` is such a write. What reads it gets the same numbers without it, as casting
    twice is casting once.
    """
    output, signature = program.graph.output_node(), program.graph_signature
    names = {str(spec.target): spec.arg.name for spec in signature.input_specs if spec.kind in _CONSTANT_KINDS}

    def is_idle(spec: OutputSpec, value: Any) -> bool:
        source = strip(value, *TRANSPARENT, aten._to_copy.default) if spec.kind in _MUTATIONS else None
        return source is not None and source.name == names.get(str(spec.target))

    results = zip(signature.output_specs, output.args[0], strict=True)
    kept = [(spec, value) for spec, value in results if not is_idle(spec, value)]
    if len(kept) < len(signature.output_specs):
        signature.output_specs[:] = [spec for spec, _ in kept]
        output.args = (tuple(value for _, value in kept),)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()


def unlift(program: ExportedProgram, *, sink: bool = True) -> GraphModule:
    """A GraphModule with the graph of `program`, its tensors shared, weights as `get_attr` and flat user inputs.

    Args:
        sink: weights of graphs in calls (`passes.subgraphs`) are constants of those, as passes want them, not operands.

    `program` keeps its own graph, graphs in it and symbols of sizes: editing the result does not change it.

    Raises:
        PassError: the program writes to a buffer, parameter or input, which passes would take for constants.
    """
    if written := written_tensors(program):
        raise PassError(f"the program writes to {', '.join(written)} while it runs, and passes take it for a constant")
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors: dict[str, Any] = {}
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind in _CONSTANT_KINDS:
            assert spec.target is not None
            store = program.state_dict if spec.target in program.state_dict else program.constants
            tensors[spec.target] = store[spec.target]
            copied[node] = graph.get_attr(spec.target)
            copied[node].meta = copy.copy(node.meta)
            continue
        if node.op == "get_attr":  # a sub-graph of a control-flow operator
            part = getattr(program.graph_module, str(node.target))
            tensors[str(node.target)] = copied_graph(part) if isinstance(part, GraphModule) else part
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    gm: GraphModule = LazyGraphModule(tensors, graph)  # whose Python code is written when somebody calls it
    separate(gm)
    if sink:
        sink_constants(gm)
    return gm


def separated(program: ExportedProgram) -> ExportedProgram:
    """`program` with its tensors shared and a graph of its own: tracing that again changes nothing of `program`."""
    gm = copied_graph(program.graph_module)
    separate(gm)
    return remade(program, root=gm, graph=gm.graph, graph_signature=copy.copy(program.graph_signature))


def remade(program: ExportedProgram, **changes: Any) -> ExportedProgram:
    """`program` with what `changes` has, by the names of its constructor, in place of its own; the rest is shared."""
    own: dict[str, Any] = {
        "root": program.graph_module,
        "graph": program.graph,
        "graph_signature": program.graph_signature,
        "state_dict": program.state_dict,
        "range_constraints": program.range_constraints,
        "module_call_graph": program.module_call_graph,
        "example_inputs": program.example_inputs,
        "constants": program.constants,
        "verifiers": [program.verifier],
    }
    return ExportedProgram(**{**own, **changes})


def lift(gm: GraphModule, program: ExportedProgram) -> ExportedProgram:
    """`gm` as an ExportedProgram with the inputs, outputs, constraints and call specification of `program`.

    A tensor that `program` does not know becomes a parameter or a persistent buffer, so that it is saved with it.

    Weights are frozen (`requires_grad` is False): the result is for inference. Parameters are new objects, so that
    those of the model keep their gradients, but share memory with them where no pass made another tensor.
    """
    hoist_constants(gm)
    known = {spec.target: spec for spec in program.graph_signature.input_specs if spec.kind in _CONSTANT_KINDS}
    uses: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and constant(gm, node) is not None:
            uses.setdefault(str(node.target), []).append(node)

    graph = Graph()
    copied: dict[Node, Node] = {}
    specs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {k: v for k, v in program.constants.items() if not isinstance(v, torch.Tensor)}
    for kind in _CONSTANT_KINDS:
        for target, nodes in uses.items():
            spec = known.get(target)
            tensor = constant(gm, nodes[0])
            if _kind(tensor, spec) is not kind:
                continue
            placeholder = graph.placeholder(_PREFIX[kind] + target.replace(".", "_"))
            placeholder.meta = {"val": nodes[0].meta["val"]}
            copied.update(dict.fromkeys(nodes, placeholder))
            was_buffer = spec is not None and spec.kind is InputKind.BUFFER
            persistent = (spec.persistent if spec and was_buffer else True) if kind is InputKind.BUFFER else None
            specs.append(InputSpec(kind, TensorArgument(placeholder.name), target, persistent))
            saved = kind is InputKind.PARAMETER or persistent
            (state if saved else constants)[target] = _frozen(tensor)
    for node in gm.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    for placeholder in graph.find_nodes(op="placeholder"):
        placeholder.target = placeholder.name  # the name is unique; the target is not for a.b_c and a_b.c
    inputs = [copied[node] for node in gm.graph.find_nodes(op="placeholder")]
    kept = [spec for spec in program.graph_signature.input_specs if spec.kind not in _CONSTANT_KINDS]
    taken = {node.name for node in graph.nodes}
    for spec, node in zip(kept, inputs, strict=True):  # by position: a copied node may have got another name
        if spec.arg.name not in taken:  # as torch.export does: FX itself makes `input_1` of `input`, Python's own name
            node.name = node.target = spec.arg.name
        specs.append(dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name)))
    return remade(
        program,
        root=_submodules(gm),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, _output_specs(program, graph)),
        state_dict=state,
        example_inputs=_examples(program, inputs),
        constants=constants,
    )


def _examples(program: ExportedProgram, inputs: list[Node]) -> Any:
    """The example inputs of `program` for placeholders of which a pass may have changed the dtype."""
    if program.example_inputs is None:
        return None
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    if len(leaves) != len(inputs):
        return program.example_inputs

    def fitting(leaf: Any, node: Node) -> Any:
        value = node.meta.get("val")
        return leaf.to(value.dtype) if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor) else leaf

    return pytree.tree_unflatten(map(fitting, leaves, inputs), spec)


def _frozen(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor` without a gradient, in an object of its own if it had one or could have."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def _kind(tensor: torch.Tensor | None, spec: InputSpec | None) -> InputKind:
    """What the signature calls `tensor`, which was `spec`: a pass can have put a Parameter in the place of a buffer."""
    if isinstance(tensor, torch.nn.Parameter):
        return InputKind.PARAMETER
    return InputKind.BUFFER if spec is None or spec.kind is InputKind.PARAMETER else spec.kind


def _submodules(gm: GraphModule) -> dict[str, Any]:
    """The sub-graphs of control-flow operators, which stay attributes."""
    return {
        str(node.target): getattr(gm, str(node.target))
        for node in gm.graph.nodes
        if node.op == "get_attr" and constant(gm, node) is None
    }


def _output_specs(program: ExportedProgram, graph: Graph) -> list[OutputSpec]:
    """The output specifications of `program` for the nodes that `graph` returns now."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    named = (TensorArgument, SymIntArgument, SymFloatArgument, SymBoolArgument)
    specs = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        arg = spec.arg
        if isinstance(value, Node) and isinstance(arg, named) and not isinstance(arg, ConstantArgument):
            arg = dataclasses.replace(arg, name=value.name)
        specs.append(dataclasses.replace(spec, arg=arg))
    return specs
