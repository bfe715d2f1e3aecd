"""Helpers for reading and editing FX graphs, used by every pass.

Every node carries its fake value in `meta["val"]` and its modules in `meta["nn_module_stack"]`; `Emitter` keeps that
true for the nodes that a pass adds. Constants are in `passes.constants`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.compat import FakeTensor, FakeTensorMode, detect_fake_mode, enable_python_dispatcher, fake_like

aten = torch.ops.aten

# Nodes that hand their input on unchanged, whatever the layout.
TRANSPARENT = (
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


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result of `node` comes from the elements at its place alone."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


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
    while is_call(node, *(targets or TRANSPARENT)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def swaps_last_two(node: Node) -> bool:
    """Whether `node` is a tensor with its last two axes swapped, and nothing else done to it."""
    if not is_call(node, aten.transpose.int, aten.permute.default):
        return False
    rank = len(shape(node))
    if is_call(node, aten.transpose.int):
        return {int(axis) % rank for axis in node.args[1:]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    return [int(axis) % rank for axis in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]  # type: ignore[arg-type,union-attr]


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


def place_of(node: Node) -> str:
    """What messages call `node`: the path of its module, its own name at the root."""
    return module_path(node) or node.name


def name_in_module(node: Node, name: str) -> str:
    """`name` below the innermost module around `node`, for a constant that belongs to it: `layers.0.q_proj.name`."""
    path = module_path(node)
    return f"{path}.{name}" if path else name


def module_class(node: Node) -> str | None:
    """Qualified class name of the innermost module around `node`."""
    stack = module_stack(node)
    return stack[-1][1] if stack else None


def ancestors(
    nodes: Iterable[Node], operands: Callable[[Node], Iterable[Node]] = operator.attrgetter("all_input_nodes")
) -> set[Node]:
    """`nodes` and all that they are computed from, as far as `operands` says."""
    found, pending = set(nodes), list(nodes)
    while pending:
        new = [operand for operand in operands(pending.pop()) if operand not in found]
        found.update(new)
        pending += new
    return found


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode that the graph's values live in; a new one for a graph without any."""
    values = (node.meta.get("val") for node in graph.nodes)  # up to the first: each node that is added asks for it
    return detect_fake_mode(next((v for v in values if isinstance(v, FakeTensor)), None)) or FakeTensorMode()


def fake_call(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a call of `target` would make, from the fake values of the nodes among its arguments."""
    fake_args, fake_kwargs = pytree.tree_map_only(Node, val, (args, kwargs))
    if getattr(target, "namespace", None) == "qcompile":
        return _own_call(mode, target, fake_args, fake_kwargs)
    return _run_fake(mode, target, fake_args, fake_kwargs)


def _run_fake(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    env = mode.shape_env
    unbound = env.ignore_fresh_unbacked_symbols() if env is not None else contextlib.nullcontext()
    # without the dispatcher torch 2.11 reads symbolic sizes in C++, and fails
    with mode, enable_python_dispatcher(), unbound:
        return target(*args, **kwargs)


class _Layout(NamedTuple):
    """What there is to know of a fake tensor without symbols, but for its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """Of a fake tensor; `value` itself if it is anything else, or has symbols."""
        if not isinstance(value, FakeTensor):
            return value
        sizes, strides = tuple(value.shape), tuple(value.stride())
        known = all(type(number) is int for number in (*sizes, *strides))
        return cls(sizes, strides, value.dtype, value.device) if known else value


def _own_call(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a call of one of our operators makes, whose results are tensors in memory of their own: most of what passes
    add is such a call, and many are alike."""
    known = tuple(map(_Layout.of, args)), tuple((name, _Layout.of(value)) for name, value in kwargs.items())
    if any(isinstance(value, FakeTensor | list) for value in (*known[0], *dict(known[1]).values())):
        return _run_fake(mode, target, args, kwargs)
    made = _own_result(target, *known)
    return _run_fake(mode, target, args, kwargs) if made is None else fake_like(mode, *made)


@functools.lru_cache(1000)
def _own_result(target: Callable[..., Any], args: Any, kwargs: Any) -> _Layout | None:
    """The layout of what `target` makes of operands of these layouts; None if that is not one tensor."""
    mode = FakeTensorMode()
    values = [fake_like(mode, *value) if isinstance(value, _Layout) else value for value in args]
    made = _Layout.of(_run_fake(mode, target, values, dict(kwargs)))
    return made if isinstance(made, _Layout) else None


def fake_again(node: Node) -> Any:
    """What the call `node` makes now, after its arguments have got other dtypes or strides.

    Sizes and numbers that the values of its operands decide (of `nonzero`, `item`) keep the symbols that they have: the
    rest of the graph knows those.
    """
    assert callable(node.target)
    mode = fake_mode(node.graph)
    value = fake_call(mode, node.target, node.args, node.kwargs)
    if not node.meta.get("unbacked_bindings"):
        return value

    def as_before(new: Any, old: Any) -> Any:
        if not isinstance(new, torch.Tensor):
            return old
        with mode:
            return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device)

    return pytree.tree_map(as_before, value, val(node))


def bounds(size: int | torch.SymInt) -> tuple[float, float]:
    """The least and the largest that `size` can be, as far as is known: a number for both where it is one."""
    if isinstance(size, int):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return int(found.lower), int(found.upper) if found.upper.is_Integer else math.inf


def following(node: Node) -> Node:
    """The first place behind `node` where a call can stand: behind all placeholders if it is one."""
    following = node.next
    while node.op == "placeholder" and following.op == "placeholder":
        following = following.next
    return following


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
        node.meta["val"] = fake_call(self.mode, target, args, kwargs)
        node.meta["nn_module_stack"] = self.like.meta.get("nn_module_stack", {})
        if "custom" in self.like.meta:
            node.meta["custom"] = dict(self.like.meta["custom"])
        return node

    def getitem(self, node: Node, index: int) -> Node:
        """One output of a node that makes several."""
        return self(operator.getitem, node, index)

    def sizes(self, node: Node) -> list[int | Node]:
        """The shape of `node` as arguments: numbers where static, `sym_size` nodes where dynamic.

        A size that the graph has already is read there: back ends can then tell that two tensors agree in it.
        """
        return [
            size if isinstance(size, int) else self._size(node, axis, size) for axis, size in enumerate(shape(node))
        ]

    def _size(self, node: Node, axis: int, size: torch.SymInt) -> Node:
        known: list[Node] = self.before.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        for found in known:
            if found < self.before and val(found).node.expr == size.node.expr:
                return found
        return self(aten.sym_size.int, node, axis)
