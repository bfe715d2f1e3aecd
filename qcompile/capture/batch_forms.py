"""The Python line that would have worked, for a batch that a captured program does not take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.graph import shape
from qcompile.remedy import closest


def calibration_form(program: ExportedProgram) -> str:
    """`calibration` with the example inputs for the only batch."""
    args, kwargs = program.example_inputs or ((1,), {})
    return f"calibration=[{'(args, kwargs)' if args and kwargs else 'kwargs' if kwargs else 'args'}]"


def rearranged(args: Sequence[Any], kwargs: Mapping[str, Any], program: ExportedProgram) -> str:
    """What makes of `batch` one that the program takes; nothing where that is not clear."""
    wanted_args, wanted = program.example_inputs or ((), {})
    if wanted_args and wanted:
        return ""
    if wanted and kwargs:
        return _renamed(list(kwargs), list(wanted))
    if wanted and len(args) == len(wanted):
        return f"dict(zip({list(wanted)}, batch))"
    names = list(program.graph_signature.user_inputs)
    if wanted_args and kwargs and kwargs.keys() == set(names):
        return f"({', '.join(f'batch[{name!r}]' for name in names)},)"
    return f"batch[:{len(wanted_args)}]" if len(args) > len(wanted_args) > 0 else ""


def _renamed(given: list[str], wanted: list[str]) -> str:
    spare = [name for name in given if name not in wanted]
    found = {}
    for name in wanted:
        near = name if name in given else closest(name, spare)
        if near is None and len(spare) == len([n for n in wanted if n not in given]) == 1:
            near = spare[0]
        if near is None:
            return ""
        found[name] = near
    return "{" + ", ".join(f"{name!r}: batch[{near!r}]" for name, near in found.items()) + "}"


def dynamic_shapes_for(inputs: Sequence[Any], placeholders: Sequence[Node], program: ExportedProgram) -> str:
    """`dynamic_shapes` with which the sizes of these inputs would have fit; nothing for nested inputs."""
    args, kwargs = program.example_inputs or ((), {})
    if len(args) + len(kwargs) != len(placeholders):
        return ""
    axes = {
        node.name: [
            axis
            for axis, (size, captured) in enumerate(zip(value.shape, shape(node), strict=False))
            if isinstance(captured, int) and size != captured
        ]
        for value, node in zip(inputs, placeholders, strict=True)
        if isinstance(value, torch.Tensor)
    }
    told = [f"{node.name!r}: " + (_dims(axes[node.name]) if axes.get(node.name) else "None") for node in placeholders]
    return f"dynamic_shapes={{{', '.join(told)}}}"


def _dims(axes: Sequence[int]) -> str:
    return "{" + ", ".join(f"{axis}: torch.export.Dim.DYNAMIC" for axis in axes) + "}"
