"""Cut a piece out of an ONNX model: from given tensors to wanted ones, with the weights that it needs and no more."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto, helper

from qcompile.errors import VerificationError
from qcompile.onnx.inlining import function_key
from qcompile.onnx.view import ModelView, reads, subgraphs

# A given tensor keeps its name where it is produced, so that one run can both give it to its users and judge it.
GIVEN = "{}::given"
# ONNX Runtime has no numpy form of these: they leave the graph in a type that holds each of their values exactly.
CARRIERS: dict[int, int] = {
    TensorProto.BFLOAT16: TensorProto.FLOAT,
    TensorProto.INT4: TensorProto.INT8,
    TensorProto.UINT4: TensorProto.UINT8,
}
CARRIED = "{}::carried"


def live_nodes(graph: onnx.GraphProto, given: Collection[str], wanted: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes, in order, that compute `wanted` when `given` need no computing.

    Raises: VerificationError if a graph input that is not given is needed, or a wanted tensor does not exist.
    """
    needed, live = set(wanted), list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(name for name in reads(node) if name not in given)
    made = {name for node in live for name in node.output} | set(given)
    made.update(tensor.name for tensor in graph.initializer)
    if unknown := sorted(set(wanted) - made - {value.name for value in graph.input}):
        raise VerificationError(f"the ONNX file has no tensor {', '.join(map(repr, unknown))}")
    if missing := [value.name for value in graph.input if value.name in needed and value.name not in made]:
        names, inputs = (", ".join(map(repr, group)) for group in (sorted(wanted), missing))
        raise VerificationError(f"{names} need graph input {inputs}, which is not given")
    return live[::-1]


def extract(view: ModelView, given: Collection[str], wanted: Collection[str]) -> onnx.ModelProto:
    """The part of `view.model` from `given` to `wanted`; weights in external data stay there.

    Each given tensor is the input `GIVEN`; each wanted one an output of its own name, or of `CARRIED` if its element
    type is in `CARRIERS`. Works on tensors of the main graph.
    """
    live = live_nodes(view.model.graph, given, wanted)
    result = onnx.ModelProto()
    result.ir_version = view.model.ir_version
    result.opset_import.extend(view.model.opset_import)
    result.functions.extend(_called(view.model, live))
    graph = result.graph
    graph.name = f"{view.model.graph.name}: to {', '.join(sorted(wanted)[:3])}"
    graph.node.extend(live)
    renamed = {name: GIVEN.format(name) for name in given}
    for node in graph.node:
        _rename(node, renamed)
    used = {name for node in graph.node for name in reads(node)} | set(wanted)
    graph.initializer.extend(tensor for tensor in view.model.graph.initializer if tensor.name in used)
    for name, new in renamed.items():
        if new in used:
            graph.input.append(_value_info(view, name, new))
    _add_outputs(view, graph, renamed, wanted)
    return result


def _add_outputs(view: ModelView, graph: onnx.GraphProto, renamed: dict[str, str], wanted: Collection[str]) -> None:
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    for name in wanted:
        if name not in made:  # a graph input that is wanted as an output as well
            graph.node.append(helper.make_node("Identity", [renamed[name]], [name]))
            if all(value.name != renamed[name] for value in graph.input):
                graph.input.append(_value_info(view, name, renamed[name]))
        elem_type = view.elem_type(name)
        if elem_type in CARRIERS:
            carried = CARRIED.format(name)
            graph.node.append(helper.make_node("Cast", [name], [carried], to=CARRIERS[elem_type]))
            graph.output.append(helper.make_tensor_value_info(carried, CARRIERS[elem_type], None))
        else:
            graph.output.append(_value_info(view, name, name))


def _value_info(view: ModelView, name: str, new: str) -> onnx.ValueInfoProto:
    """Type without a shape: what is fed decides, a calibration batch included."""
    elem_type = view.elem_type(name)
    if elem_type is None:
        raise VerificationError(f"the type of tensor '{name}' cannot be inferred, so that it cannot be given or read")
    return helper.make_tensor_value_info(new, elem_type, None)


def _rename(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = renamed.get(name, name)
    for graph in subgraphs(node):
        for inner in graph.node:
            _rename(inner, renamed)
        for value in graph.output:
            value.name = renamed.get(value.name, value.name)


def _called(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Iterator[onnx.FunctionProto]:
    """The functions that `nodes` call, with those that their bodies call, in the model's order."""
    functions = {function_key(function): function for function in model.functions}
    called, queue = set(), [function_key(node) for node in _with_inner(nodes)]
    while queue:
        key = queue.pop()
        if key in functions and key not in called:
            called.add(key)
            queue += [function_key(node) for node in _with_inner(functions[key].node)]
    return (function for key, function in functions.items() if key in called)


def _with_inner(nodes: Collection[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _with_inner(graph.node)
