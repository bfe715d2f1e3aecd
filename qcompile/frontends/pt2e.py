"""Graph modules that `convert_pt2e` of torchao returned; `passes.canonicalize.pt2e` knows their operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule

__all__ = ["NAMESPACE", "capture_ready", "is_quantized"]

NAMESPACE = "quantized_decomposed"
"""Of the operators in its graphs."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `model` is a graph with operators of `quantized_decomposed`."""
    return isinstance(model, GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE
        for node in model.graph.nodes
    )


@contextlib.contextmanager
def capture_ready(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Let `model` be put into eval mode, which graphs of pt2e refuse; the refusal is back afterwards."""
    kept: dict[str, Any] = {name: model.__dict__.pop(name) for name in ("eval", "train") if name in model.__dict__}
    try:
        yield model
    finally:
        model.__dict__.update(kept)
