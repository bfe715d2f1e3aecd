"""What the weights of a model take in a file, before the file is made."""

from __future__ import annotations

import math

import torch
from torch.export import ExportedProgram

from qcompile.recipe import Recipe
from qcompile.recipe.asked import asked_formats
from qcompile.schemes.words import WORDS

_BYTES = {word.format: word.ir.element_bytes for word in WORDS}


def least_bytes(model: torch.nn.Module | ExportedProgram, recipe: Recipe | None, dtype: torch.dtype | None) -> int:
    """What the weights of `model` take in a file at least.

    Every matrix is counted in the smallest format that `recipe` asks for, as only the captured graph tells which ones
    it leaves out; an embedding stays in the compute dtype, and codes are what they are.

    Args:
        recipe: None for a model that is quantized already. dtype: what was asked for; None is half precision.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    tables = {id(module.weight) for module in modules if isinstance(module, torch.nn.Embedding)}
    formats = _BYTES if recipe is None else {f: _BYTES.get(f, 1.0) for f in asked_formats(recipe)}
    wide = float((dtype or torch.float16).itemsize)

    def size(tensor: torch.Tensor) -> float:
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            return tensor.element_size()
        return min([wide, *formats.values()]) if tensor.ndim >= 2 and id(tensor) not in tables else wide

    return math.ceil(sum(tensor.numel() * size(tensor) for tensor in model.parameters()))


def program_bytes(program: ExportedProgram) -> int:
    """Bytes of the tensors that `program` reads, each once: what a file of it has about."""
    used = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and spec.arg.name in used:
            tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
            if isinstance(tensor, torch.Tensor):
                found[id(tensor)] = tensor.nbytes
    return sum(found.values())
