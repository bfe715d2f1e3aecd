"""One input for one tensor: torch.export can have it twice, as a buffer and as a constant that the model holds, too."""

from __future__ import annotations

import dataclasses

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from passes.program import remade, separated

__all__ = ["merge_aliases"]


def merge_aliases(program: ExportedProgram) -> ExportedProgram:
    """`program` without the constants that are one of its buffers: these are read and written in their place.

    A cache object that a model holds beside the buffers, as transformers' exports of its static cache do, is such. What
    is written to the constant is else no state of the program, and torch cannot make it functional.
    """
    buffers = {
        key: spec
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.BUFFER and (key := _key(_tensor(program, str(spec.target)))) is not None
    }
    same = {
        spec.arg.name: buffers[key].arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
        and (key := _key(_tensor(program, str(spec.target)))) is not None
        and key in buffers
    }
    if not same:
        return program
    program = separated(program)
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for name, buffer in same.items():
        nodes[name].replace_all_uses_with(nodes[buffer])
        program.graph.erase_node(nodes[name])
    program.graph_module.recompile()
    dropped = {spec.target for spec in program.graph_signature.input_specs if spec.arg.name in same}
    specs = [spec for spec in program.graph_signature.input_specs if spec.arg.name not in same]
    return remade(
        program,
        graph_signature=dataclasses.replace(program.graph_signature, input_specs=specs),
        constants={name: value for name, value in program.constants.items() if name not in dropped},
    )


def _tensor(program: ExportedProgram, name: str) -> object:
    return program.state_dict.get(name, program.constants.get(name))


def _key(tensor: object) -> tuple[object, ...] | None:
    """The same for two names of one tensor; None for what is none, or has no memory."""
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or not tensor.numel()
    ):
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
