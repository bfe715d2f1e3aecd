"""The symbols of dynamic and data-dependent sizes: each graph that passes work on has its own.

Fake values share a `ShapeEnv`, which grows wherever a graph is run on them again: `nonzero` makes a symbol for its
count each time. A program whose graph shared it with others would be another one afterwards: its next trace finds
symbols that nothing binds, and its next file has other names for the same sizes.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from passes.compat import FakeTensor, FakeTensorMode
from passes.graph import fake_mode

__all__ = ["separate"]

_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def separate(gm: GraphModule) -> None:
    """Give the graph of `gm` and those in it fake values that no other graph has, in place.

    Symbols keep their names and what is known of them. A graph without symbols stays as it is.
    """
    mode = fake_mode(gm.graph)
    if mode.shape_env is None or not mode.shape_env.var_to_range:
        return
    moved = _Moved(mode)
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("example_value", None)  # of the old mode, and torch looks there first
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(moved, node.meta["val"])


class _Moved:
    """Maps the values of one fake mode to those of a copy of it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        assert mode.shape_env is not None
        self.env = _copied(mode.shape_env)
        self.mode = FakeTensorMode(
            allow_fallback_kernels=mode.allow_fallback_kernels,
            allow_non_fake_inputs=mode.allow_non_fake_inputs,
            shape_env=self.env,
            static_shapes=mode.static_shapes,
            export=mode.fake_tensor_converter.export,
        )
        self._known: dict[int, tuple[Any, Any]] = {}  # with the old value, so that its id stays its own

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, (FakeTensor, *_SYMBOLIC)):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = (value, self._moved(value))
        return self._known[id(value)][1]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            sizes, strides = ([self(number) for number in numbers] for numbers in (value.shape, value.stride()))
            with self.mode:
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        node = copy.copy(value.node)
        node.shape_env = self.env
        return type(value)(node)


def _copied(env: ShapeEnv) -> ShapeEnv:
    """`env` with containers of its own, and so are those in them."""
    new = copy.copy(env)
    for name, value in vars(env).items():
        if isinstance(value, MutableMapping):
            value = copy.copy(value)
            value.update((key, copy.copy(item)) for key, item in value.items() if isinstance(item, _CONTAINERS))
            setattr(new, name, value)
        elif isinstance(value, _CONTAINERS):
            setattr(new, name, copy.copy(value))
    return new
