"""What Dynamo's weights and modules are called in the model: `layers.0.fc.weight`, as torch.export has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def roots_of(placeholders: Sequence[Node], graph: Graph) -> set[str]:
    """The variables of the user's code that hold modules: `self`, as a rule."""
    sources = {source_of(node).partition(".")[0] for node in placeholders if _is_static(node)}
    stacks = (node.meta.get("nn_module_stack", {}) for node in graph.nodes)
    return sources | {_dotted(path).partition(".")[0] for stack in stacks for path, _ in stack.values()}


def weight_names(placeholders: Sequence[Node], fakes: Sequence[Any], roots: set[str]) -> dict[int, str]:
    """Position -> dotted name, of parameters and buffers."""
    names: dict[int, str] = {}
    for index, (node, value) in enumerate(zip(placeholders, fakes, strict=True)):
        if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and _is_static(node)):
            name = _below_root(source_of(node), roots) or source_of(node)
            names[index] = name if name not in names.values() else f"{name}_{index}"
    return names


def _is_static(node: Node) -> bool:
    """Whether Dynamo says that an input belongs to a module."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def source_of(node: Node) -> str:
    """Where Dynamo found an input: `self.layers.0.fc.weight` for `L['self']._modules['layers']...`."""
    name = node._dynamo_source.name  # type: ignore[attr-defined]
    return _dotted(name() if callable(name) else name)


def _dotted(source: str) -> str:
    dotted = re.sub(r"\.(_(modules|parameters|buffers)(?=\[)|__dict__\['_(modules|parameters|buffers)'\])", "", source)
    return re.sub(r"^[LG]\.", "", re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", dotted))


def _below_root(path: str, roots: set[str]) -> str:
    """`path` without the variable that holds the model, if there is only one."""
    root, _, rest = path.partition(".")
    return rest if len(roots) == 1 or root == "self" else path


def clean_stack(node: Node, roots: set[str]) -> None:
    """Write the paths of modules as torch.export does: `layers.0.fc`, not `L['self'].layers[0].fc`."""
    if stack := node.meta.get("nn_module_stack"):
        node.meta["nn_module_stack"] = {k: (_below_root(_dotted(p), roots), kind) for k, (p, kind) in stack.items()}
