"""Compute tensors that depend on sizes only, at concrete sizes.

A causal mask comes as twenty operators on aranges. What they compute depends on no input's values, so it can simply be
computed: at the one size of a static program, and at sizes chosen to tell the possible results apart in a dynamic one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from passes.constants import constant
from passes.dependence import metadata_operand, value_operands
from passes.graph import aten, fake_mode, is_call, val
from passes.normalize.size_choice import Sizes, choose_sizes

__all__ = ["NotEvaluable", "SizeFunctions"]

MAX_BYTES = 128 << 20  # of one tensor of an evaluation


class NotEvaluable(Exception):
    """A value cannot be computed at the sizes it would have to be; the message says why."""


class TooLarge(NotEvaluable):
    """A value would take more memory than an evaluation may."""


class SizeFunctions:
    """The nodes of a graph whose values are functions of sizes, and those values.

    Results are remembered by node: make a new instance after the graph's inputs change. With `parameters`, those count
    as constants too.
    """

    def __init__(self, gm: GraphModule, parameters: bool = False) -> None:
        self.gm = gm
        self.parameters = parameters
        self.env = fake_mode(gm.graph).shape_env
        self._known: dict[Node, bool] = {}
        for node in gm.graph.nodes:  # in order, so that no recursion is as deep as the graph
            self.is_size_function(node)

    def is_size_function(self, node: Node) -> bool:
        """Whether no value of a user input or a parameter, and nothing random or mutable, reaches `node`.

        A parameter has the value it has by training; what kind of mask something is should not depend on it.
        """
        if node not in self._known:
            self._known[node] = self._is_size_function(node)
        return self._known[node]

    def _is_size_function(self, node: Node) -> bool:
        if isinstance(node.meta.get("val"), int | torch.SymInt):
            return True  # computed from the expression in its meta
        if node.op == "get_attr":
            value = constant(self.gm, node)
            allowed = value is not None and (self.parameters or not isinstance(value, torch.nn.Parameter))
            return allowed and not node.meta.get("mutable")
        if is_call(node, operator.getitem):
            return self.is_size_function(node.args[0])  # type: ignore[arg-type]  # one of several results
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
            return False
        if node.target.namespace == "qcompile":  # a quantization operator is never evaluated early
            return False
        return all(self.is_size_function(n) for n in value_operands(node))

    def samples(self, node: Node) -> Iterator[tuple[Sizes, torch.Tensor]]:
        """The value of `node` at its static size, or at sizes that together tell what function of the sizes it is.

        What a mask makes of sizes changes only where a size passes a number that the mask is computed with (a window,
        the length of a buffer), so each symbol takes values around each of those, besides some of every kind.

        Raises:
            NotEvaluable: a number that the mask depends on is out of reach, or an operator fails.
        """
        for sizes, optional in choose_sizes(self.gm, self._program(node), self.env):
            try:
                yield sizes, self._evaluate(node, sizes, {})
            except TooLarge:
                if not optional:
                    raise

    def _program(self, node: Node) -> list[Node]:
        """`node` and all it is computed from."""
        seen: dict[Node, None] = {}
        pending = [node]
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen[current] = None
            if current.op == "call_function" and not isinstance(current.meta.get("val"), int | torch.SymInt):
                if (metadata := metadata_operand(current)) is not None:
                    seen[metadata] = None
                pending += value_operands(current)
        return list(seen)

    def _evaluate(self, node: Node, sizes: Sizes, memo: dict[Node, Any]) -> Any:
        """The value of `node` on the CPU with the symbols of its shape replaced by numbers."""
        if node in memo:
            return memo[node]
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            return _number(value, sizes)
        stored = constant(self.gm, node)
        if stored is not None:
            return stored.detach().cpu()
        expected = [tuple(_number(size, sizes) for size in tensor.shape) for tensor in pytree.tree_leaves(value)]
        if _bytes(node, expected) > MAX_BYTES:
            raise TooLarge(f"{node.name} has shape {_shapes(expected)} at sizes {_text(sizes)}, too large to compute")
        skip = metadata_operand(node)

        def argument(arg: Node) -> Any:
            if arg is not skip:
                return self._evaluate(arg, sizes, memo)
            like = val(arg)
            return torch.empty((), dtype=like.dtype).expand([_number(size, sizes) for size in like.shape])

        args, kwargs = map_arg((node.args, dict(node.kwargs)), argument)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]  # an OpOverload
        except (RuntimeError, IndexError) as error:
            raise NotEvaluable(f"{node.name} fails at sizes {_text(sizes)}: {error}") from error
        found = [tuple(tensor.shape) for tensor in pytree.tree_leaves(result)]
        if found != expected:
            raise NotEvaluable(
                f"{node.name} has shape {_shapes(found)} at sizes {_text(sizes)}, not {_shapes(expected)}"
            )
        memo[node] = result
        return result


def _number(value: int | torch.SymInt, sizes: Sizes) -> int:
    return int(value.node.expr.xreplace(sizes)) if isinstance(value, torch.SymInt) else int(value)


def _bytes(node: Node, shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes that computing `node` at `shapes` allocates; a view allocates none."""
    if node.target in (aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, operator.getitem):
        return 0
    tensors = pytree.tree_leaves(val(node))
    return sum(tensor.dtype.itemsize * math.prod(size) for tensor, size in zip(tensors, shapes, strict=True))


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _text(sizes: Sizes) -> str:
    return ", ".join(f"{symbol}={value}" for symbol, value in sizes.items()) or "given"
