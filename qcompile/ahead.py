"""Whether a GPU has the arithmetic for a recipe, a program or a checkpoint: known before the long work on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.export import ExportedProgram

from passes.formats import get_format
from passes.graph import place_of
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.subgraphs import all_calls
from qcompile.engine.capability import lacking
from qcompile.errors import EngineError
from qcompile.recipe import Recipe
from qcompile.recipe.asked import asked_formats
from qcompile.schemes.layer import QuantizedLinear


def check_recipe_target(recipe: Recipe, target: int, dtype: torch.dtype | None = None) -> None:
    """Raise EngineError for the formats of `recipe`, and a compute dtype, that a GPU has no arithmetic for.

    Args:
        target: its compute capability, such as 89.
    """
    lines = [
        f"{rule.where}: the recipe {recipe.metadata.name} asks for {format} ({rule.quantizer!r}), and {reason}"
        for format, rule in asked_formats(recipe).items()
        if (reason := lacking(format, target))
    ]
    if dtype is not None and (reason := lacking(str(dtype).removeprefix("torch."), target)):
        lines.append(f"{dtype} was asked for, and {reason}")
    if lines:
        raise EngineError("\n".join(lines))


def check_model_target(model: torch.nn.Module | ExportedProgram, target: int) -> None:
    """Raise EngineError for a quantized program, or a loaded checkpoint, in a format that the GPU `target` lacks."""
    for place, format in formats_of(model):
        if reason := lacking(format, target):
            raise EngineError(f"{place} is quantized to {format}, and {reason}")


def formats_of(model: torch.nn.Module | ExportedProgram) -> Iterator[tuple[str, str]]:
    """(place, format as recipes call it) of all that is quantized."""
    if isinstance(model, ExportedProgram):
        for node in all_calls(model.graph_module, QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE):
            yield place_of(node), get_format(str(node.kwargs["format"])).family
    else:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                yield name, module.scheme.weight.family
