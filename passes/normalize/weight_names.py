"""What weights are called that are pieces of a parameter, or computed of some: by the layer, and the part of it."""

from __future__ import annotations

import operator
import re
from itertools import count

import torch
from torch.fx import GraphModule, Node

from passes.constants import LAYOUT, add_constant, constant, constant_before, equal_bits
from passes.evaluation import needed_for
from passes.graph import aten, is_call

__all__ = ["Names", "layer_of", "piece_of", "whole_of"]

_TAKES_PART = (
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.unbind.int, operator.getitem),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections),
)
# `parametrizations.weight.original0`, `weight_orig` and `weight_v` of torch.nn.utils stand for `weight`
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original\d*$")
_HOOKED = re.compile(r"(weight|bias)_(orig|v|g)$")
_LEAF = re.compile(r"[._]?(weight|bias)(_\d+)?$")


def whole_of(node: Node) -> Node | None:
    """The `get_attr` that `node` is a piece of, by operators that take a part of one tensor and rearrange it."""
    takes_part = False
    while is_call(node, *_TAKES_PART, *LAYOUT) and isinstance(node.args[0], Node):
        takes_part = takes_part or is_call(node, *_TAKES_PART)
        node = node.args[0]
    return node if takes_part and node.op == "get_attr" else None


def layer_of(name: str) -> tuple[str, str]:
    """Path of a parameter's layer, and `weight` or `bias`: what `torch.nn.utils` adds to the name is taken off."""
    name = _HOOKED.sub(r"\1", _PARAMETRIZED.sub(r"\1\2", name))
    leaf = _LEAF.search(name)
    return _LEAF.sub("", name), leaf[1] if leaf else "weight"


def piece_of(whole: torch.Tensor, part: torch.Tensor) -> str:
    """What `part` is of `whole`: `.rows_0_64`, `.columns_0_64`, `.2` for one of a batch; empty for all of it.

    The name says where the piece lies, so that it is the same in every graph, whatever other pieces that has.
    """
    if part.numel() == whole.numel():
        return ""
    offset = int(part.storage_offset() - whole.storage_offset())
    same_memory = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not same_memory or not whole.is_contiguous() or not part.numel():
        return ".part"
    row = whole.stride(0)
    if part.is_contiguous() and offset % row == 0 and part.numel() % row == 0:
        start, stop = offset // row, (offset + part.numel()) // row
        return f".{start}" if part.ndim < whole.ndim and stop == start + 1 else f".rows_{start}_{stop}"
    if part.stride() != whole.stride():
        return f".part_{offset}"
    labels = ""
    for axis, (size, full, stride) in enumerate(zip(part.shape, whole.shape, whole.stride(), strict=True)):
        start, offset = divmod(offset, stride)
        if size != full:
            kind = "rows" if axis == 0 else "columns" if axis == whole.ndim - 1 else f"axis{axis}"
            labels += f".{kind}_{start}_{start + size}"
    return labels


class Names:
    """Puts constants in the places of `replaced`, each with a layer of its own.

    Attributes:
        taken: (layer, leaf) of what the graph reads besides.
        stored: the same of what was put there -> its value and node.
    """

    def __init__(self, gm: GraphModule, replaced: dict[Node, None]) -> None:
        self.gm, read = gm, set[Node]()
        for node in reversed(gm.graph.nodes):
            if node not in replaced and (node.is_impure() or not read.isdisjoint(node.users)):
                read.add(node)
        tensors = (node for node in read if constant(gm, node) is not None)
        self.taken = {layer_of(str(node.target)) for node in tensors}
        self.stored: dict[tuple[str, str], tuple[torch.Tensor, Node]] = {}
        self.is_parameter = {node: _is_parameter(gm, node) for node in replaced}

    def store(self, node: Node, value: torch.Tensor, layer: str, leaf: str) -> None:
        """Put `value` in the place of `node`, called after `layer`, or with a number if that is another tensor's."""
        for number in count():
            key = f"{layer}.computed_{number}".lstrip(".") if number else layer, leaf
            known = self.stored.get(key)
            if known is not None and equal_bits(known[0], value):
                new = constant_before(known[1], node)
                break
            if known is None and key not in self.taken:
                if value.ndim < 2 or value.device.type != "cpu":
                    value = value.clone()  # torch saves parts of one storage from a CPU only, and the whole of it then
                tensor = torch.nn.Parameter(value, requires_grad=False) if self.is_parameter[node] else value
                new = add_constant(self.gm, ".".join(key).lstrip("."), tensor, node)
                self.stored[key] = value, new
                break
        # what is returned (Dynamo: a weight that a hook sets) must not be a parameter, which a caller could write to
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user.op != "output")


def _is_parameter(gm: GraphModule, node: Node) -> bool:
    return any(isinstance(constant(gm, n), torch.nn.Parameter) for n in needed_for([node]))
