"""What a program writes to, as inputs and outputs: it keeps nothing itself, and passes take buffers for constants.

A functional program of torch.export computes what a buffer or an input holds afterwards, and torch copies it there
behind the call. Here it is handed over instead: buffers come in by the argument `state`, and what is written goes out
beside what the model returns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
)
from torch.utils import _pytree as pytree

from passes.program import remade, separated
from passes.result import Carried

__all__ = ["carry_writes", "initial_state", "state_names"]

_STATE = "state"  # the argument


def carry_writes(program: ExportedProgram) -> ExportedProgram:
    """`program`, which is functional, with the buffers that it writes to as inputs, and all that it writes as outputs.

    `y = m(x)` becomes `y, state = m(x, state=state)`, with `state` of paths of buffers; the examples are their values.
    An input that is written to stays where it is. A program that writes to nothing, or to parameters, is as it was.
    """
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if not kinds & {OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION}:
        return program
    if OutputKind.PARAMETER_MUTATION in kinds:
        return program
    program = separated(program)
    written = [s for s in program.graph_signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    buffers = [str(s.target) for s in written if s.kind is OutputKind.BUFFER_MUTATION]
    inputs, values = _inputs(program, buffers)
    outputs = _outputs(program)
    program.graph_module.recompile()
    names = [str(s.target) for s in written]
    in_spec, out_spec = _call_spec(program, buffers, names)
    return remade(
        program,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: tensor for name, tensor in program.state_dict.items() if name not in values},
        module_call_graph=_call_graph(program, in_spec, out_spec),
        example_inputs=_examples(program, in_spec, values),
        constants={name: value for name, value in program.constants.items() if name not in values},
    )


def state_names(program: ExportedProgram) -> list[str]:
    """What `program` carries: paths of buffers and names of inputs, in the order of its last outputs."""
    spec = program.call_spec.out_spec
    carries = spec is not None and Carried in (spec.type, spec.context)  # torch calls all named tuples by one type
    return list(spec.children()[1].context) if carries else []


def initial_state(program: ExportedProgram) -> dict[str, dict[str, torch.Tensor]]:
    """The argument by which buffers come in, with the values that they had at capture; nothing without one."""
    names, example = set(state_names(program)), program.example_inputs
    found = example[1] if example is not None else {}
    last = next(reversed(found), None)
    given = found[last] if last is not None else None
    return {last: given} if names and isinstance(given, dict) and given and names.issuperset(given) else {}  # type: ignore[dict-item]


def _inputs(program: ExportedProgram, buffers: list[str]) -> tuple[list[InputSpec], dict[str, torch.Tensor]]:
    """The inputs with those of `buffers` behind all others, where they are moved to; and the values of these."""
    specs = program.graph_signature.input_specs
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    last, values, moved = list(nodes.values())[-1], {}, []
    found = {s.target: s for s in specs if s.kind is InputKind.BUFFER}
    for name in buffers:
        spec = found[name]
        store = program.state_dict if name in program.state_dict else program.constants
        values[name] = store[name].detach().clone()
        last.append(nodes[spec.arg.name])
        last = nodes[spec.arg.name]
        moved.append(InputSpec(InputKind.USER_INPUT, spec.arg, None))
    kept = [s for s in specs if s.kind is not InputKind.BUFFER or s.target not in values]
    return kept + moved, values


def _outputs(program: ExportedProgram) -> list[OutputSpec]:
    """The outputs with what is written behind all others, where it is moved to."""
    output, specs = program.graph.output_node(), program.graph_signature.output_specs
    results: Any = output.args[0]
    both = sorted(zip(specs, results, strict=True), key=lambda pair: pair[0].kind is not OutputKind.USER_OUTPUT)
    output.args = (tuple(value for _, value in both),)
    return [
        spec if spec.kind is OutputKind.USER_OUTPUT else OutputSpec(OutputKind.USER_OUTPUT, spec.arg, None)
        for spec, _ in both
    ]


def _call_spec(program: ExportedProgram, buffers: list[str], written: list[str]) -> tuple[Any, Any]:
    """How it is called, and what comes of that."""
    before = program.call_spec
    assert before.in_spec is not None and before.out_spec is not None
    args, kwargs = pytree.tree_unflatten(range(before.in_spec.num_leaves), before.in_spec)
    name = _STATE
    while name in kwargs or name in (program.module_call_graph[0].signature.forward_arg_names or ()):
        name += "_"
    carried = {name: dict.fromkeys(buffers, 0)} if buffers else {}
    outputs = pytree.tree_unflatten(range(before.out_spec.num_leaves), before.out_spec)
    return (
        pytree.tree_structure((args, {**kwargs, **carried})),
        pytree.tree_structure(Carried(outputs, dict.fromkeys(written, torch.empty(0)))),
    )


def _call_graph(program: ExportedProgram, in_spec: Any, out_spec: Any) -> list[Any]:
    root, *rest = program.module_call_graph
    assert root.signature is not None
    names = root.signature.forward_arg_names
    taken = list(in_spec.children()[1].context)
    signature = dataclasses.replace(
        root.signature,
        inputs=[],  # as torch.export leaves them for the root
        outputs=[],
        in_spec=in_spec,
        out_spec=out_spec,
        forward_arg_names=None if names is None else [*names, *(name for name in taken if name not in names)],
    )
    return [dataclasses.replace(root, signature=signature), *rest]


def _examples(program: ExportedProgram, in_spec: Any, values: dict[str, torch.Tensor]) -> Any:
    if program.example_inputs is None:
        return None
    return pytree.tree_unflatten([*pytree.tree_leaves(program.example_inputs), *values.values()], in_spec)
