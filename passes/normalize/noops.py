"""Remove what hands its input on unchanged."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.graph import argument, aten, is_call, val

__all__ = ["RemoveNoOps"]

# Operators that change dtype, device, shape or strides, and nothing else: without such a change they do nothing.
_METADATA_ONLY = (
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.expand.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_NEUTRAL = {
    1: (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    0: (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar),
}
# Operators whose result depends on the strides of their input, or that fail for some.
_STRIDED = (aten.view.default, aten._unsafe_view.default, aten.view.dtype, aten.as_strided.default)
_VIEWS = (
    *(target for target in _METADATA_ONLY if target not in (aten.clone.default, aten._to_copy.default)),
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
)


class RemoveNoOps(Pass):
    """Remove assertions about metadata, copies and views of the same layout, empty padding, arithmetic with 1 or 0.

    Before:
        _assert_tensor_metadata(x)
        y = relu(slice(mul(clone(cat([tensor([]), x])), 1.0), 0, 0, maxint))
    After:
        y = relu(x)

    Requires: a functional graph in inference mode. Copies into another memory layout go only if no operator depends on
        strides (`ViewsToReshape` ran).
    Ensures: the values, dtype and shape of every remaining node, and the strides of graph outputs, are what they were.
    Declines when: the node is a graph output whose storage would then be that of an input, a weight or another output:
        a caller that writes to one would change the other.
    Why: dropout leaves clones, `.to(dtype)` leaves assertions and dynamic export leaves full slices between the
        operators that later passes match on.
    """

    def rewrite(self, gm: GraphModule) -> None:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        strided = any(is_call(node, *_STRIDED) for node in gm.graph.nodes)
        for node in list(gm.graph.nodes):
            if is_call(node, aten._assert_tensor_metadata.default):
                gm.graph.erase_node(node)
                self.fire()
                continue
            source = _unchanged_input(node)
            if source is None or (strided and not _same_strides(source, node)):
                continue
            kept = output in node.users and not self._may_return(source, node, output)
            if node.replace_all_uses_with(source, delete_user_cb=lambda user, kept=kept: not (kept and user is output)):
                self.fire()
            if not kept:
                gm.graph.erase_node(node)

    def _may_return(self, source: Node, node: Node, output: Node) -> bool:
        """Whether the graph can return `source` in the place of `node`."""
        if not _same_strides(source, node):
            return False
        root = _storage(source)
        others = [other for other in output.all_input_nodes if other is not node]
        if root.op in ("placeholder", "get_attr") or any(_storage(other) is root for other in others):
            self.decline("a graph output would share its storage with an input, a weight or another output", node)
            return False
        return True


def _unchanged_input(node: Node) -> Node | None:
    """The input of `node` if its output is the same in value, dtype, device and shape."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if _is_squeezed_again(source, node):  # as an addition in place on a squeezed tensor captures
        return source.args[0]  # type: ignore[union-attr,return-value]
    if is_call(node, aten.cat.default):
        source = _only_part(node)
    elif is_call(node, aten.copy.default):  # what is written over all of a slice
        source = node.args[1]
    if not isinstance(source, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not isinstance(source.meta.get("val"), torch.Tensor) or not _same_type(val(source), val(node)):
        return None
    if is_call(node, *_METADATA_ONLY, aten.cat.default, aten.copy.default):
        return source
    if is_call(node, aten.slice.Tensor):  # as long as the axis, so all of it
        return source if argument(node, "step") == 1 else None
    if is_call(node, aten.pad.default, aten.constant_pad_nd.default):
        return source if not any(argument(node, "pad")) else None
    if is_call(node, aten.dropout.default):
        return source if not argument(node, "train") or argument(node, "p") == 0 else None
    if is_call(node, aten.transpose.int):
        rank = val(node).ndim
        return source if argument(node, "dim0") % rank == argument(node, "dim1") % rank else None
    if is_call(node, aten.permute.default):
        return source if list(argument(node, "dims")) == list(range(val(node).ndim)) else None
    for neutral, targets in _NEUTRAL.items():
        if is_call(node, *targets) and isinstance(node.args[1], int | float) and node.args[1] == neutral:
            return source
    return None


def _only_part(cat: Node) -> Node | None:
    """The only part of a concatenation that is not the empty tensor `[]`, which fits everything: a cache begins so."""
    parts = [part for part in cat.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    found = [part for part in parts if tuple(val(part).shape) != (0,)]
    return found[0] if len(found) == 1 else None


def _is_squeezed_again(source: object, node: Node) -> bool:
    """Whether `source` adds the axis that `node` takes away."""
    if not is_call(source, aten.unsqueeze.default) or not is_call(node, aten.squeeze.dim):
        return False
    assert isinstance(source, Node)
    rank: int = val(source).ndim
    return int(argument(source, "dim")) % rank == int(argument(node, "dim")) % rank


def _same_type(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, device and shape are provably the same."""
    if a.dtype != b.dtype or a.device != b.device or a.ndim != b.ndim:
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _same_strides(a: Node, b: Node) -> bool:
    """Whether two tensors of one shape provably have the same strides along axes longer than 1."""
    return all(
        statically_known_true(size == 1) or statically_known_true(m == n)
        for size, m, n in zip(val(a).shape, val(a).stride(), val(b).stride(), strict=True)
    )


def _storage(node: Node) -> Node:
    """The node that allocates the storage of `node`."""
    while is_call(node, *_VIEWS) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
