"""Helpers for reading and editing FX graphs, used by every pass.

Weights and other constants are `get_attr` nodes here (see `passes.program`), and every node carries its fake value in
`meta["val"]`; `Emitter` keeps both true for the nodes that a pass adds.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# Nodes that hand their input on unchanged, whatever the layout.
_TRANSPARENT = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)


def val(node: Node) -> Any:
    """The fake value of `node`: a FakeTensor, a SymInt, or a tuple of those."""
    return node.meta["val"]


def shape(node: Node) -> torch.Size:
    """Shape of the tensor that `node` makes; dimensions can be symbolic."""
    result = val(node).shape
    assert isinstance(result, torch.Size)
    return result


def dtype(node: Node) -> torch.dtype:
    """Element type of the tensor that `node` makes."""
    result = val(node).dtype
    assert isinstance(result, torch.dtype)
    return result


def is_call(node: object, *targets: object) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def calls(graph: Graph, *targets: Callable[..., Any]) -> Iterator[Node]:
    """The calls of `targets` in topological order, as they stand now (safe to edit while iterating)."""
    return (node for node in list(graph.nodes) if is_call(node, *targets))


def argument(node: Node, name: str, default: Any = None) -> Any:
    """Argument `name` of an operator call, wherever the caller put it; the schema's default if it is left out."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, schema in enumerate(node.target._schema.arguments):
        if schema.name == name:
            if not schema.kwarg_only and index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, schema.default_value if schema.has_default_value() else default)
    return default


def strip(node: Node, *targets: Callable[..., Any]) -> Node:
    """Walk up from `node` over operators that hand their first argument on (clones by default)."""
    while is_call(node, *(targets or _TRANSPARENT)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def only_user(node: Node) -> Node | None:
    """The user of `node` if it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Path and class name of the modules around `node`, outermost first.

    Dynamo writes paths as `L['self'].layers.0.q_proj` and torch.export as `layers.0.q_proj`; both become the latter.
    """
    stack = []
    for path, module_class in node.meta.get("nn_module_stack", {}).values():
        clean = re.sub(r"^L\['self'\]\.?", "", path)
        clean = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", clean).removeprefix(".")
        if not isinstance(module_class, str):
            module_class = f"{module_class.__module__}.{module_class.__qualname__}"
        stack.append((clean, module_class))
    return stack


def module_path(node: Node) -> str:
    """Dotted path of the innermost module around `node`; empty at the top."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_class(node: Node) -> str | None:
    """Qualified class name of the innermost module around `node`."""
    stack = module_stack(node)
    return stack[-1][1] if stack else None


def constant(gm: GraphModule, node: object) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, or None if `node` is anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = functools.reduce(getattr, str(node.target).split("."), gm)
    return value if isinstance(value, torch.Tensor) else None


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
    value = strip(value, *_TRANSPARENT, aten.expand.default, aten._to_copy.default)
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
    rearranged or quantized is still found under its own name, and is stored once.
    """
    roots = root_constants(node)
    name = str(roots[0].target)
    if len(roots) == 1 and not _is_read_elsewhere(gm, name, node):
        delete_constant(gm, name)
    node.replace_all_uses_with(add_constant(gm, name, torch.nn.Parameter(tensor, requires_grad=False), node))
    gm.graph.erase_node(node)


def delete_constant(gm: GraphModule, name: str) -> None:
    """Unregister the tensor called `name`; its `get_attr` nodes have to be dead."""
    owner, _, leaf = name.rpartition(".")
    delattr(gm.get_submodule(owner), leaf)


def _is_read_elsewhere(gm: GraphModule, name: str, node: Node) -> bool:
    """Whether anything but the path to `node` reads the constant `name`."""
    pending = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
    while pending:
        for user in pending.pop().users:
            if user is node:
                continue
            if not is_constant_expression(user):
                return True
            pending.append(user)
    return False


# Operators that only rearrange: a weight is still a constant behind them.
_LAYOUT = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten._to_copy.default,
    aten.cat.default,
    *_TRANSPARENT,
)


def is_constant_expression(node: object) -> bool:
    """Whether `node` is a weight: a `get_attr`, or one rearranged by layout operators."""
    if not isinstance(node, Node):
        return False
    return node.op == "get_attr" or (is_call(node, *_LAYOUT) and all(map(is_constant_expression, node.all_input_nodes)))


def evaluate_constant(gm: GraphModule, node: Node) -> torch.Tensor:
    """The tensor that a constant expression stands for."""
    value = constant(gm, node)
    if value is not None:
        return value.detach()
    args, kwargs = pytree.tree_map_only(Node, lambda n: evaluate_constant(gm, n), (node.args, node.kwargs))
    assert callable(node.target)
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result.detach()


def root_constants(node: Node) -> list[Node]:
    """The `get_attr` nodes that a constant expression is made of."""
    if node.op == "get_attr":
        return [node]
    return [root for operand in node.all_input_nodes for root in root_constants(operand)]


def input_dependence(gm: GraphModule) -> list[set[str]]:
    """For each output, the names of the user inputs whose values it depends on (their sizes do not count)."""
    reached: dict[Node, set[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            reached[node] = {node.name}
        elif is_call(node, aten.sym_size.int):
            reached[node] = set()
        else:
            reached[node] = set().union(*(reached[operand] for operand in node.all_input_nodes))
    results = gm.graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    return [reached[result] if isinstance(result, Node) else set() for result in results]


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode that the graph's values live in; a new one for a graph without any."""
    values = (node.meta.get("val") for node in graph.nodes)  # up to the first: each node that is added asks for it
    return detect_fake_mode(next((v for v in values if isinstance(v, FakeTensor)), None)) or FakeTensorMode()


def add_constant(gm: GraphModule, name: str, tensor: torch.Tensor, before: Node) -> Node:
    """Register `tensor` (a buffer unless it is a Parameter) and return a `get_attr` node for it placed before `before`.

    `name` may be dotted, as a parameter's; where it is taken, or lies below a tensor, it gets dots less or a number.
    """
    if _lies_below_tensor(gm, name):
        name = name.replace(".", "_")
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
    mode = fake_mode(gm.graph)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    node.meta["nn_module_stack"] = before.meta.get("nn_module_stack", {})
    return node


def _lookup(gm: GraphModule, path: Sequence[str]) -> object:
    """What `gm` has under a dotted path; None if nothing."""
    found: object = gm
    for part in path:
        found = getattr(found, part, None)
    return found


def _is_free(gm: GraphModule, name: str) -> bool:
    return _lookup(gm, name.split(".")) is None


def _lies_below_tensor(gm: GraphModule, name: str) -> bool:
    """Whether a part of the path before the last dot is a tensor (a parameter `proj` beside `proj_weight`)."""
    path = name.split(".")
    return any(isinstance(_lookup(gm, path[:end]), torch.Tensor) for end in range(1, len(path)))


class Emitter:
    """Adds calls to a graph before one node, each with its fake value and with the module stack of `like`.

    >>> emit = Emitter(before=linear, like=linear)
    >>> emit(aten.mul.Tensor, x, 0.125)
    """

    def __init__(self, before: Node, like: Node | None = None) -> None:
        self.before = before
        self.like = like if like is not None else before
        self.mode = fake_mode(before.graph)

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        graph = self.before.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = pytree.tree_map_only(Node, val, (args, kwargs))
        with self.mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        node.meta["nn_module_stack"] = self.like.meta.get("nn_module_stack", {})
        if "custom" in self.like.meta:
            node.meta["custom"] = dict(self.like.meta["custom"])
        return node

    def getitem(self, node: Node, index: int) -> Node:
        """One output of a node that makes several."""
        return self(operator.getitem, node, index)

    def sizes(self, node: Node) -> list[int | Node]:
        """The shape of `node` as arguments: numbers where static, `sym_size` nodes where dynamic."""
        sizes = enumerate(shape(node))
        return [size if isinstance(size, int) else self(aten.sym_size.int, node, axis) for axis, size in sizes]
