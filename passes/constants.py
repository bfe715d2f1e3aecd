"""Constants of a graph: weights, buffers and scales, which are `get_attr` nodes here (see `passes.program`).

A constant expression is a constant behind operators that only rearrange, cast or rotate it; it is still a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.compat import FakeTensor, FakeTensorMode, fake_like
from passes.graph import TRANSPARENT, argument, aten, fake_mode, is_call, strip
from passes.hadamard import HADAMARD, hadamard

_NAMED = 4  # weights that the name of what is made of them has


def constant(gm: GraphModule, node: object) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, or None if `node` is anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = functools.reduce(getattr, str(node.target).split("."), gm)
    return value if isinstance(value, torch.Tensor) else None


def named_constant(gm: GraphModule, name: str) -> torch.Tensor | None:
    """The tensor that `gm` has under a dotted `name`; None if there is none."""
    value = _lookup(gm, name.split("."))
    return value if isinstance(value, torch.Tensor) else None


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN, and formats that torch does not compare, are equal, too."""
    if a is b:
        return True
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


def constant_before(node: Node, before: Node) -> Node:
    """Another `get_attr` of the constant that `node` reads, placed before `before`."""
    with before.graph.inserting_before(before):
        copy = before.graph.get_attr(str(node.target))
    copy.meta = dict(node.meta)
    return copy


def scalar(gm: GraphModule, value: object) -> float | None:
    """The number that `value`, a number or a constant tensor, is everywhere; None if there is no such number."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    value = strip(value, *TRANSPARENT, aten.expand.default, aten._to_copy.default)
    if is_call(value, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    if is_call(value, aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return 1.0
    if is_call(value, aten.full.default, aten.full_like.default, aten.new_full.default):
        return scalar(gm, argument(value, "fill_value"))
    if is_call(value, aten.scalar_tensor.default):
        return scalar(gm, value.args[0])
    tensor = constant(gm, value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 and not tensor.is_complex() else None


def replace_with_constant(gm: GraphModule, node: Node, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of `node`, a constant expression or an operator on one.

    It takes over the name of the constant that `node` was made of if nothing else reads that, so a weight that was
    rearranged or quantized is still found under its own name, and is stored once. What is made of several is called
    after all: `attention.q_proj+k_proj.weight`.
    """
    roots = root_constants(node)
    name = _joint_name(list(dict.fromkeys(str(root.target) for root in roots)))
    if len(roots) == 1 and not is_read_beside(gm, name, {node}):
        delete_constant(gm, name)
    node.replace_all_uses_with(add_constant(gm, name, torch.nn.Parameter(tensor, requires_grad=False), node))
    gm.graph.erase_node(node)


def _joint_name(names: list[str]) -> str:
    """What the weights `names` are called together: the first in full, of others their last module."""
    parts = [name.rpartition(".") for name in names]
    if len(names) > _NAMED or len({leaf for _, _, leaf in parts}) > 1 or not all(owner for owner, _, _ in parts):
        return names[0]
    owners = [parts[0][0], *(owner.rpartition(".")[2] for owner, _, _ in parts[1:])]
    return f"{'+'.join(owners)}.{parts[0][2]}"


def delete_constant(gm: GraphModule, name: str) -> None:
    """Unregister the tensor called `name`; its `get_attr` nodes have to be dead."""
    owner, _, leaf = name.rpartition(".")
    delattr(gm.get_submodule(owner), leaf)


def is_read_beside(gm: GraphModule, name: str, nodes: Collection[Node]) -> bool:
    """Whether anything but the paths to `nodes` reads the constant `name`."""
    pending = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
    while pending:
        for user in pending.pop().users:
            if user in nodes:
                continue
            if not is_constant_expression(user):
                return True
            pending.append(user)
    return False


# Operators that only rearrange, rotate, or take one expert's part: a weight is still a constant behind them.
LAYOUT = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten._to_copy.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    HADAMARD,
    *TRANSPARENT,
)


def is_constant_expression(node: object) -> bool:
    """Whether `node` is a weight: a `get_attr`, or one rearranged by layout operators."""
    if not isinstance(node, Node):
        return False
    return node.op == "get_attr" or (is_call(node, *LAYOUT) and all(map(is_constant_expression, node.all_input_nodes)))


def evaluate_constant(gm: GraphModule, node: Node) -> torch.Tensor:
    """The tensor that a constant expression stands for."""
    value = constant(gm, node)
    if value is not None:
        return value.detach()
    args, kwargs = pytree.tree_map_only(Node, lambda n: evaluate_constant(gm, n), (node.args, node.kwargs))
    if is_call(node, aten.cat.default) and (joined := _joined(*args)) is not None:
        return joined
    assert callable(node.target)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result.detach()


def _joined(parts: Sequence[torch.Tensor], axis: int = 0) -> torch.Tensor | None:
    """The rows of `parts` as one tensor without a copy, where they lie one behind the other in memory; else None."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        storage = part.untyped_storage().data_ptr()
        if axis or not part.is_contiguous() or part.storage_offset() != end:
            return None
        if storage != first.untyped_storage().data_ptr() or part.dtype != first.dtype or part.ndim != first.ndim:
            return None
        if part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


class ConstantRows:
    """The tensor that a constant expression stands for, some rows (of its first axis) at a time.

    The fp32 intermediates of a whole weight are many times its codes, and among the codes that stay they leave holes
    that the allocator does not give back: 180 MB for a ViT-base. A rotated weight comes in float32, unrounded.
    """

    _CHUNK = 1 << 20  # elements; in smaller pieces a rotation spends its time waiting for threads

    def __init__(self, gm: GraphModule, node: Node, multiple: int = 1, piece: int = _CHUNK) -> None:
        """
        Args:
            multiple: how many rows belong together; each piece but the last has a multiple of them.
            piece: how many elements to give at a time, at least one row; of a rotated weight more.
        """
        rotated = strip(node, aten._to_copy.default)
        self._rotate = is_call(rotated, HADAMARD)
        self._tensor = evaluate_constant(gm, rotated.all_input_nodes[0] if self._rotate else node)
        self.shape, self.device = self._tensor.shape, self._tensor.device
        rows = (self._CHUNK if self._rotate else piece) * self.shape[0] // max(1, self._tensor.numel())
        self._step = max(1, rows // multiple) * multiple

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, self.shape[0], self._step):
            rows = slice(start, start + self._step)
            yield rows, hadamard(self._tensor[rows]) if self._rotate else self._tensor[rows]


def root_constants(node: Node) -> list[Node]:
    """The `get_attr` nodes that a constant expression is made of."""
    if node.op == "get_attr":
        return [node]
    return [root for operand in node.all_input_nodes for root in root_constants(operand)]


def add_constant(gm: GraphModule, name: str, tensor: torch.Tensor, before: Node) -> Node:
    """Register `tensor` (a buffer unless it is a Parameter) and return a `get_attr` node for it placed before `before`.

    `name` may be dotted, as a parameter's; where it is taken it gets a number, and below a tensor `_` for dots.
    """
    name = _beside_tensors(gm, name)
    unique, count = name, 0
    while not _is_free(gm, unique):
        count += 1
        unique = f"{name}_{count}"
    *path, leaf = unique.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(unique)
    node.meta["val"] = _fake(fake_mode(gm.graph), tensor)
    node.meta["nn_module_stack"] = before.meta.get("nn_module_stack", {})
    return node


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """What stands for `tensor`; the quick way for one that shares its memory with no other."""
    size = tensor.numel() * tensor.element_size()
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if plain and not tensor.requires_grad and tensor.untyped_storage().nbytes() == size:
        return fake_like(mode, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return mode.from_tensor(tensor, static_shapes=True)


def _lookup(gm: GraphModule, path: Sequence[str]) -> object:
    """What `gm` has under a dotted path; None if nothing."""
    found: object = gm
    for part in path:
        found = getattr(found, part, None)
    return found


def _is_free(gm: GraphModule, name: str) -> bool:
    return _lookup(gm, name.split(".")) is None


def _beside_tensors(gm: GraphModule, name: str) -> str:
    """`name`, where it goes on below a tensor (`a.proj.weight` with a parameter `a.proj`) as `a.proj_weight`."""
    path = name.split(".")
    for end in range(1, len(path)):
        if isinstance(_lookup(gm, path[:end]), torch.Tensor):
            return ".".join([*path[: end - 1], "_".join(path[end - 1 :])])
    return name
