"""What Dynamo's weights and modules are called in the model: `layers.0.fc.weight`, as torch.export has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.compat.dynamo import source

# What AOTAutograd reads of an input that does not move: CUDA graphs do not copy it, and may write to it.
STATIC = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


def roots_of(placeholders: Sequence[Node], graph: Graph) -> set[str]:
    """The variables of the user's code that hold modules: `self`, as a rule."""
    sources = {source_of(node).partition(".")[0] for node in placeholders if _is_static(node)}
    stacks = (node.meta.get("nn_module_stack", {}) for node in graph.nodes)
    return sources | {_dotted(path).partition(".")[0] for stack in stacks for path, _ in stack.values()}


def weight_names(placeholders: Sequence[Node], fakes: Sequence[Any]) -> dict[int, str]:
    """Position -> dotted name with its root, of parameters and buffers."""
    names: dict[int, str] = {}
    for index, (node, value) in enumerate(zip(placeholders, fakes, strict=True)):
        if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and _is_static(node)):
            name = source_of(node)
            names[index] = name if name not in names.values() else f"{name}_{index}"
    return names


def _is_static(node: Node) -> bool:
    """Whether Dynamo says that an input belongs to a module."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def source_of(node: Node) -> str:
    """Where Dynamo found an input: `self.layers.0.fc.weight` for `L['self']._modules['layers']...`."""
    name = source(node).name
    return _dotted(name() if callable(name) else name)


def _dotted(source: str) -> str:
    dotted = re.sub(r"\.(_(modules|parameters|buffers)(?=\[)|__dict__\['_(modules|parameters|buffers)'\])", "", source)
    return re.sub(r"^[LG]\.", "", re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", dotted))


def clean_stack(node: Node) -> None:
    """Write the paths of modules with dots, as those of weights: `self.layers.0.fc`, not `L['self'].layers[0].fc`."""
    if stack := node.meta.get("nn_module_stack"):
        node.meta["nn_module_stack"] = {key: (_dotted(path), kind) for key, (path, kind) in stack.items()}


@dataclass(frozen=True)
class Naming:
    """Names in the frame that Dynamo captured -> names in the model.

    Dynamo compiles the frame of a block by itself where it cannot capture what calls it, and behind a graph break a
    module is what stood on the stack (`___stack0.weight`). Rules of recipes and ranges of calibration are for names in
    the model, and so are reports.

    Attributes:
        roots: the variables of the frame that hold modules.
        paths: variable -> path in the model of the module that it holds, where that is known.
    """

    roots: frozenset[str]
    paths: Mapping[str, str]

    @classmethod
    def of(cls, roots: set[str], weights: Mapping[str, torch.Tensor], owners: Mapping[int, Sequence[str]]) -> Naming:
        """
        Args:
            weights: dotted name with its root -> tensor.
            owners: identity of a tensor -> paths of the modules in the model that have it.
        """
        fitting: dict[str, list[str]] = {}
        for name, weight in weights.items():
            root, _, owner = name.rpartition(".")[0].partition(".")
            paths = [_without_end(path, owner) for path in owners.get(id(weight), ())]
            found = [path for path in paths if path is not None]
            if found:  # a weight that modules share has several paths: one that fits the others, too
                fitting[root] = [path for path in fitting.get(root, found) if path in found] or fitting[root]
        return cls(frozenset(roots), {root: paths[0] for root, paths in fitting.items()})

    def __call__(self, name: str) -> str:
        root, _, rest = name.partition(".")
        if root in self.paths:
            return ".".join(filter(None, (self.paths[root], rest)))
        return rest if len(self.roots) == 1 or root == "self" else name


def _without_end(path: str, end: str) -> str | None:
    """`path` without `end`, or None if it ends otherwise."""
    if not end or path == end:
        return path if not end else ""
    return path.removesuffix(f".{end}") if path.endswith(f".{end}") else None
