"""Weights of the graphs in a call (`passes.subgraphs`): constants of those graphs for passes, operands for torch.

Before and after `sink_constants`, and the other way round for `hoist_constants`:
    y = cond(p, (x, w, b) -> linear(x, w, b), (x, w, b) -> x, [x, w, b])
    y = cond(p, (x) -> linear(x, w, b), (x) -> x, [x])
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, constant, delete_constant, equal_bits, named_constant
from passes.graph import Emitter, aten, following
from passes.subgraphs import OPERANDS, held, is_worked_on, operands_of, subgraph_calls

__all__ = ["hoist_constants", "sink_constants"]

_ALIASES = (aten.reshape.default, aten.contiguous.default, aten._to_copy.default)  # as views are, or can be


def sink_constants(gm: GraphModule) -> None:
    """Make weights that are operands of calls in `gm` constants of the graphs in them, in place.

    The nodes of these graphs that know no module get those of the call.
    """
    moved: dict[Node, None] = {}
    for call in filter(is_worked_on, subgraph_calls(gm.graph)):
        operands = operands_of(call)
        bodies = list(held(gm, call).values())
        for index in reversed(range(len(operands))):
            node, after = operands[index], len(operands) - index
            if (tensor := constant(gm, node)) is None:
                continue
            for body in bodies:
                _input_to_constant(body, body.graph.find_nodes(op="placeholder")[-after], str(node.target), tensor)
            moved[operands.pop(index)] = None
        _set_operands(call, operands)
        for body in bodies:
            for node in body.graph.nodes:
                node.meta["nn_module_stack"] = node.meta.get("nn_module_stack") or call.meta.get("nn_module_stack", {})
            sink_constants(body)
            body.recompile()
    for node in moved:
        if not node.users:
            gm.graph.erase_node(node)
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name in {str(node.target) for node in moved} - read:
        delete_constant(gm, name)


def hoist_constants(gm: GraphModule) -> None:
    """Make all constants of the graphs in the calls of `gm` operands of these, in place.

    What graphs have under one name with the same bits is one operand. What a graph returns shares no memory with what
    it takes, as torch demands.
    """
    for call in filter(is_worked_on, subgraph_calls(gm.graph)):
        bodies = list(held(gm, call).values())
        outer: list[Node] = []
        for body in bodies:
            hoist_constants(body)
            for node in body.graph.find_nodes(op="get_attr"):
                tensor = constant(body, node)
                if tensor is not None and not any(_is_constant(gm, o, str(node.target), tensor) for o in outer):
                    outer.append(_constant_outside(gm, node, tensor, call))
        for body in bodies:
            _constants_to_inputs(gm, body, outer)
            _separate_results(body)
            body.graph.lint()
            body.recompile()
        _set_operands(call, [*operands_of(call), *outer])


def _set_operands(call: Node, operands: Sequence[Any]) -> None:
    call.update_arg(OPERANDS, tuple(operands))


def _input_to_constant(body: GraphModule, placeholder: Node, name: str, tensor: torch.Tensor) -> None:
    if placeholder.users:
        node = add_constant(body, name, tensor, following(placeholder))
        node.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(node)
    body.graph.erase_node(placeholder)


def _is_constant(gm: GraphModule, node: Node, name: str, tensor: torch.Tensor) -> bool:
    """Whether `node` of `gm` reads what another graph reads as `name`: its own name can have got a number."""
    found = constant(gm, node)
    return found is not None and node.meta["name_inside"] == name and equal_bits(found, tensor)


def _constant_outside(gm: GraphModule, inside: Node, tensor: torch.Tensor, call: Node) -> Node:
    name = str(inside.target)
    known = named_constant(gm, name)
    if known is not None and equal_bits(known, tensor):
        with gm.graph.inserting_before(call):
            node = gm.graph.get_attr(name)
        node.meta["nn_module_stack"] = inside.meta.get("nn_module_stack", {})
    else:
        node = add_constant(gm, name, tensor, call)
    node.meta |= {"val": inside.meta["val"], "name_inside": name}
    return node


def _constants_to_inputs(gm: GraphModule, body: GraphModule, outer: Sequence[Node]) -> None:
    """Give `body` an input for each of `outer`, read where it read the same constant."""
    constants = [(n, tensor) for n in body.graph.find_nodes(op="get_attr") if (tensor := constant(body, n)) is not None]
    for node in outer:
        inputs = body.graph.find_nodes(op="placeholder")
        with body.graph.inserting_before(following(inputs[-1]) if inputs else next(iter(body.graph.nodes))):
            placeholder = body.graph.placeholder(f"{str(node.target).replace('.', '_')}_outside")
        placeholder.meta["val"] = node.meta["val"]
        for inside, tensor in constants:
            if inside.users and _is_constant(gm, node, str(inside.target), tensor):
                inside.replace_all_uses_with(placeholder)
    for inside, _ in constants:
        body.graph.erase_node(inside)
    left = (body.named_parameters(remove_duplicate=False), body.named_buffers(remove_duplicate=False))
    for name, _ in [item for named in left for item in named]:  # those that no node reads any more, too
        delete_constant(body, name)


def _separate_results(body: GraphModule) -> None:
    """Copy each result that is an input, or may be a view of one, and each that is returned before."""
    output = body.graph.output_node()
    returned: set[Node] = set()

    def separate(result: Node) -> Node:
        shared = result in returned or _may_alias_input(result)
        returned.add(result)
        return Emitter(output)(aten.clone.default, result) if shared else result

    output.args = torch.fx.node.map_arg(output.args, separate)


def _may_alias_input(node: Node) -> bool:
    while node.op == "call_function":
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if not (is_view or node.target in (*_ALIASES, operator.getitem)) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return isinstance(node.meta.get("val"), torch.Tensor)
