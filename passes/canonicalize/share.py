"""Layers that quantize one tensor in the same way share one pair of quantizers."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import constant
from passes.graph import aten, calls, is_call
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE


class ShareQuantizers(Pass):
    """Make one quantize/dequantize of those that give the same numbers.

    Before:
        a = linear(dequantize(quantize(x, s), s), ...)          # each layer has quantizers of its own
        b = linear(dequantize(quantize(x, t), t), ...)          # and s == t
    After:
        y = dequantize(quantize(x, s), s)
        a, b = linear(y, ...), linear(y, ...)

    Requires: nothing.
    Ensures: the same values, bit by bit.
    Declines when: never; scales that differ stay apart.
    Why: other tools put quantizers into modules, so q, k and v each have their own for the tensor that all three read;
        only layers with one input can be merged.
    """

    def rewrite(self, gm: GraphModule) -> None:
        first: dict[tuple[object, ...], Node] = {}
        for node in calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE, DEQUANTIZE, operator.getitem):
            key = (node.target, *(_identity(gm, arg) for arg in node.args), *sorted(map(str, node.kwargs.items())))
            same = first.setdefault(key, node)
            if same is not node:
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)
                self.fire()


def _identity(gm: GraphModule, argument: object, depth: int = 8) -> object:
    """What two arguments have in common if they are equal: a constant scalar goes by its value.

    One that is measured at run time goes by what it is computed from, to a depth at which the steps of an amax end.
    """
    if depth and isinstance(argument, Node) and argument.op == "call_function" and _is_measured(argument):
        parts = (_identity(gm, part, depth - 1) if isinstance(part, Node) else str(part) for part in argument.args)
        return (argument.target, *parts, *sorted(map(str, argument.kwargs.items())))
    tensor = constant(gm, argument)
    if tensor is None or tensor.numel() != 1:
        return getattr(argument, "target", argument) if tensor is not None else argument
    return (tensor.dtype, tuple(tensor.shape), float(tensor))


def _is_measured(node: Node) -> bool:
    """Whether `node` is a number that is computed at run time, or the magnitudes that it is the largest of."""
    value = node.meta.get("val")
    return is_call(node, aten.abs.default) or (
        isinstance(value, torch.Tensor) and all(size == 1 for size in value.shape)
    )
