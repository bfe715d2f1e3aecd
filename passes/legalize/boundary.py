"""Inputs and outputs of a program take another floating-point type."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, dtype, following, is_call, place_of, val
from passes.messages import some
from passes.subgraphs import graphs

__all__ = ["ConvertBoundary"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ConvertBoundary(Pass):
    """Give the program's floating-point inputs and outputs the dtype `target`; what is between computes as before.

    Before (a float32 boundary, computing in float16):
        y = linear(_to_copy(x, float16), w)
        return _to_copy(y, float32), sin(t)
    After (target float16):
        y = linear(x, w)
        return y, _to_copy(sin(_to_copy(t, float32)), float16)

    Requires: `ConvertComputeDtype` ran, if it is to.
    Ensures: the same values, but for the rounding of inputs and outputs to `target`; a notice names outputs whose
        numbers can be beyond it. Inputs of graphs in calls are none of the program's.
    Declines when: never. Codes, integers and complex numbers keep their dtype.
    Why: an application whose tensors are in float16 would cast them to float32, and the model cast them back; each of
        these casts is a kernel.
    """

    keeps_dtypes = False

    def __init__(self, target: torch.dtype) -> None:
        super().__init__()
        self.target = target
        self.inner: set[GraphModule] = set()

    def rewrite(self, gm: GraphModule) -> None:
        if gm in self.inner:
            return
        self.inner.update(graphs(gm)[1:])
        for node in filter(self._differs, gm.graph.find_nodes(op="placeholder")):
            self._convert_input(node)
            self.fire()
        output, beyond = gm.graph.output_node(), []
        for node in filter(self._differs, output.all_input_nodes):
            source = _unwidened(node)
            if self._differs(source):
                if torch.finfo(dtype(source)).max > 2 * torch.finfo(self.target).max:
                    beyond.append(place_of(source))
                source = Emitter(output, like=node)(aten._to_copy.default, source, dtype=self.target)
            output.replace_input_with(node, source)
            self.fire()
        if beyond:
            limit = torch.finfo(self.target).max
            self.notice(
                f"outputs are cast to {self.target}, where numbers beyond {limit:.5g} are infinite: {some(beyond)}"
            )

    def _differs(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dtype in _FLOATS and value.dtype is not self.target

    def _convert_input(self, node: Node) -> None:
        own, readers = dtype(node), [user for user in node.users if user.op != "output" and _makes_tensors(user)]
        node.meta["val"] = val(node).to(self.target)
        if not readers:
            return
        restored = Emitter(following(node), like=readers[0])(aten._to_copy.default, node, dtype=own)
        for user in readers:
            if not (_is_cast(user) and _holds(own, self.target)):
                user.replace_input_with(node, restored)
            elif dtype(user) is self.target:
                user.replace_all_uses_with(node)


def _unwidened(node: Node) -> Node:
    """What `node` is cast from, if `node` holds the same numbers; else `node`."""
    source = node.all_input_nodes[0] if _is_cast(node) else node
    return source if _holds(dtype(node), dtype(source)) else node


def _is_cast(node: Node) -> bool:
    return is_call(node, aten._to_copy.default) and set(node.kwargs) == {"dtype"}


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    return wide in _FLOATS and narrow in _FLOATS and torch.promote_types(wide, narrow) is wide


def _makes_tensors(node: Node) -> bool:
    """Whether `node` reads more of a tensor than a size."""
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
