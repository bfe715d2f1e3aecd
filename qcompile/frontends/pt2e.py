"""Graph modules that `convert_pt2e` of torchao returned; `passes.canonicalize.pt2e` knows their operators."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

__all__ = ["NAMESPACE", "is_quantized"]

NAMESPACE = "quantized_decomposed"
"""Of the operators in its graphs."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `model` is a graph with operators of `quantized_decomposed`."""
    return isinstance(model, GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE
        for node in model.graph.nodes
    )
