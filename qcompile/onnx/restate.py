"""Shapes that ONNX cannot infer are written into the graph, so that everything behind them has one.

    before:  GroupNormalization -> SiLU, Transpose, QuantizeLinear                    nobody knows a shape or a type
    after:   GroupNormalization -> Cast -> Reshape [0, 64, 8, 8] -> SiLU, ...         what torch says; 0: as it was

onnx 1.23 has no inference for GroupNormalization. What the file notes of intermediates is no help: tools that infer
anew, as the verifier does, drop it. Neither of the two is a kernel, in TensorRT or in ONNX Runtime.

In the bodies of If, Loop and Scan inference knows less: what a Loop carries has no shape there, as it could change from
step to step, and the shape that a Reshape reads from outside is a tensor of unknown numbers. The former is restated,
the latter moves in as a Constant.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference

from qcompile.onnx.initializers import initializer, taken_names, unique_name
from qcompile.onnx.loading import without_weights
from qcompile.onnx.view import all_graphs


def restate_shapes(model: ir.Model) -> int:
    """Restate the type and shape of each value that loses them, in place. Returns how many.

    *Requires*: values have the types and shapes that torch.onnx gave them. One without stays as it is.
    """
    taken = taken_names(model)
    _bring_in_sizes(model, taken)
    count = 0
    while found := _to_restate(model):  # what stands behind them may lose its own
        for value in found:
            _restate(model, value, taken)
        count += len(found)
    return count


def _to_restate(model: ir.Model) -> list[ir.Value]:
    """The values that inference does not find: those that come from none such, and those of operators without one."""
    shaped = _inferred(model)
    lost: set[ir.Value | None] = set()
    found = []
    for graph in (model.graph, *model.graph.subgraphs()):
        if graph is not model.graph:
            found += [v for v in graph.inputs if v.name not in shaped and _is_known(v)]
            lost.update(found)
        for node in graph:
            behind = any(value in lost for value in node.inputs)
            for value in node.outputs:
                if value.name in shaped or not (behind or _is_known(value)):
                    continue
                lost.add(value)
                if _is_known(value) and (not behind or _has_no_inference(node, model.opset_imports[""])):
                    found.append(value)
    return found


def _is_known(value: ir.Value) -> bool:
    """Whether torch says what `value` is, to another reader than the Cast of `_restate`."""
    readers = [use.node for use in value.uses()]
    restated = all(node.op_type == "Cast" and node.outputs[0].dtype == value.dtype for node in readers)
    return value.shape is not None and value.dtype is not None and not restated


def _inferred(model: ir.Model) -> set[str]:
    """The names of the values that have a type and a shape without what the file notes of intermediates."""
    with without_weights(model) as proto:
        for graph in all_graphs(proto.graph):
            del graph.value_info[:]
        inferred = shape_inference.infer_shapes(proto).graph
    graphs = list(all_graphs(inferred))
    groups = [group for graph in graphs for group in (graph.input, graph.value_info, graph.output)]
    return {info.name for group in groups for info in group if info.type.tensor_type.HasField("shape")}


def _has_no_inference(node: ir.Node, opset: int) -> bool:
    """Whether the standard says nothing of the types that `node` makes."""
    if node.domain or not onnx.defs.has(node.op_type):
        return False
    return not onnx.defs.get_schema(node.op_type, opset).has_type_and_shape_inference_function


def _restate(model: ir.Model, value: ir.Value, taken: set[str | None]) -> None:
    assert value.shape is not None and value.dtype is not None
    sizes = [size if isinstance(size, int) else 0 for size in value.shape]
    node = value.producer()
    graph = node.graph if node is not None else value.graph
    assert graph is not None
    name, array = "_".join(("shape", *map(str, sizes))), np.array(sizes, np.int64)
    outside = graph is model.graph
    shape = initializer(model, name, array) if outside else _constant(graph, f"{name}_inside", ir.tensor(array), taken)
    typed = _named(ir.node("Cast", [value], {"to": int(value.dtype)}), f"{value.name}_typed", taken)
    shaped = _named(ir.node("Reshape", [typed.outputs[0], shape]), f"{value.name}_shaped", taken)
    typed.outputs[0].type = shaped.outputs[0].type = value.type
    shaped.outputs[0].shape = value.shape
    readers = [use for use in value.uses() if use.node is not typed]
    place = node or shape.producer()  # an input of a body: behind the Constant at its start
    assert place is not None
    for new in (typed, shaped):
        new.metadata_props.update(place.metadata_props)
    graph.insert_after(place, [typed, shaped])
    for use in readers:
        use.node.replace_input_with(use.idx, shaped.outputs[0])


def _bring_in_sizes(model: ir.Model, taken: set[str | None]) -> None:
    """Give the bodies of If, Loop and Scan the integers that they read from outside as Constants of their own."""
    for graph in model.graph.subgraphs():
        own: dict[ir.Value, ir.Value] = {}
        for node in graph:
            for index, value in enumerate(node.inputs):
                if value is None or not value.is_initializer() or value.dtype is not ir.DataType.INT64:
                    continue
                assert value.const_value is not None
                if value not in own:
                    own[value] = _constant(graph, str(value.name), value.const_value, taken)
                node.replace_input_with(index, own[value])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, taken: set[str | None]) -> ir.Value:
    """`tensor` as a Constant at the start of `graph`."""
    node = _named(ir.node("Constant", [], {"value": tensor}), name, taken)
    graph.insert_before(graph[0], node)
    value = node.outputs[0]
    value.dtype, value.shape, value.const_value = tensor.dtype, ir.Shape(tensor.shape.numpy()), tensor
    return value


def _named(node: ir.Node, name: str, taken: set[str | None]) -> ir.Node:
    node.outputs[0].name = unique_name(taken, name)
    return node
