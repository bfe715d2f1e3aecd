"""Operators that Torch-TensorRT has no converter for are written with others that it has."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from passes.graph import fake_mode, val
from passes.ir import repeat_kv
from qcompile.compat.torch import has_composite_kernel

Table = Mapping[Any, Callable[..., Any]]


def decompose(gm: GraphModule, table: Table, converted: Collection[Any], has_converter: Callable[[Node], bool]) -> None:
    """Replace each call that has no converter, but an entry in `table` or a body in torch, by what that makes of it.

    Only those: a second trace of the whole graph would rename the weights and lose what the passes arranged. New nodes
    have fake values and the module stack of the call.

    Args:
        gm: changed in place.
        table: operator -> what computes it with others.
        converted: operators that there are converters for; in the result they stay.
        has_converter: whether this very call has one, which can depend on its arguments.
    """
    further = {target: by for target, by in table.items() if target not in converted}
    for node in list(gm.graph.nodes):
        written = node.op == "call_function" and (node.target in table or _is_composite(node.target))
        if written and not has_converter(node):
            _replace(node, _traced(node, table.get(node.target, node.target), further))
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _is_composite(target: Any) -> bool:
    """Whether torch itself writes the operator with others; a program that nobody has decomposed holds some."""
    return isinstance(target, torch._ops.OpOverload) and has_composite_kernel(target)


def _traced(node: Node, by: Callable[..., Any], table: Table) -> Graph:
    """The graph in which `by` computes `node` from `node.all_input_nodes`."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = pytree.tree_map_only(Node, lambda n: given[n], (node.args, node.kwargs))
        return by(*args, **kwargs)

    with fake_mode(node.graph):
        functional = torch.func.functionalize(call)  # torch's own decompositions write in place
        traced = make_fx(functional, decomposition_table=dict(table))(*map(val, inputs))
    assert isinstance(traced, GraphModule)
    traced.graph.eliminate_dead_code()
    return traced.graph


def _replace(node: Node, graph: Graph) -> None:
    """Put the nodes of `graph` in the place of `node`."""
    copied = dict(zip(graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for new in graph.nodes:
            if new.op == "call_function":
                copied[new] = node.graph.node_copy(new, lambda n: copied[n])
                copied[new].meta = {**node.meta, "val": new.meta["val"]}
    (result,) = graph.output_node().args
    if isinstance(result, Node):
        node.replace_all_uses_with(copied[result])
    else:
        assert isinstance(result, (tuple, list))
        for user in list(node.users):  # an operator with several outputs: each is read by a getitem
            assert user.target is operator.getitem and isinstance(user.args[1], int)
            part = result[user.args[1]]
            assert isinstance(part, Node)
            user.replace_all_uses_with(copied[part])
            node.graph.erase_node(user)
    node.graph.erase_node(node)  # to torch.fx attention is no dead code, as its dropout reads a seed


def rms_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`aten.rms_norm` by its definition, computed in float32; torch's own decomposition has a write in place."""
    wide = x.float()
    least = torch.finfo(torch.float32).eps if eps is None else eps
    mean = (wide * wide).mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    normal = wide / (mean + least).sqrt()
    return (normal if weight is None else normal * weight.float()).to(x.dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`aten.scaled_dot_product_attention` as matmul, softmax, matmul, with the arguments of that.

    It is what the ONNX route writes. Torch-TensorRT's own converter takes `is_causal` for lower-right aligned.
    """
    k, v = (repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])) if enable_gqa else (k, v)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if is_causal:
        rows = torch.arange(q.shape[-2], device=q.device).unsqueeze(1)
        mask = torch.arange(k.shape[-2], device=q.device).unsqueeze(0) <= rows
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.full([], torch.finfo(q.dtype).min / 2, dtype=q.dtype, device=q.device)
        mask = torch.where(mask, torch.zeros([], dtype=q.dtype, device=q.device), lowest)
    return (scores if mask is None else scores + mask).softmax(-1) @ v
