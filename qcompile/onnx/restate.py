"""Shapes that ONNX cannot infer are written into the graph, so that everything behind them has one.

    before:  GroupNormalization -> SiLU, Transpose, QuantizeLinear                    nobody knows a shape or a type
    after:   GroupNormalization -> Cast -> Reshape [0, 64, 8, 8] -> SiLU, ...         what torch says; 0: as it was

onnx 1.23 has no inference for GroupNormalization. What the file notes of intermediates is no help: tools that infer
anew, as the verifier does, drop it. Neither of the two is a kernel, in TensorRT or in ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference

from qcompile.onnx.initializers import initializer
from qcompile.onnx.loading import without_weights


def restate_shapes(model: ir.Model) -> int:
    """Restate the type and shape of each value of the main graph that loses them, in place. Returns how many.

    *Requires*: values have the types and shapes that torch.onnx gave them. One without stays as it is.
    """
    count = 0
    while found := _to_restate(model):  # what stands behind them may lose its own
        for value in found:
            _restate(model, value)
        count += len(found)
    return count


def _to_restate(model: ir.Model) -> list[ir.Value]:
    """The values that inference does not find: those that come from none such, and those of operators without one."""
    shaped = _inferred(model)
    lost: set[ir.Value | None] = set()
    found = []
    for node in model.graph:
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
        del proto.graph.value_info[:]
        graph = shape_inference.infer_shapes(proto).graph
    groups = (graph.input, graph.value_info, graph.output)
    return {info.name for group in groups for info in group if info.type.tensor_type.HasField("shape")}


def _has_no_inference(node: ir.Node, opset: int) -> bool:
    """Whether the standard says nothing of the types that `node` makes."""
    if node.domain or not onnx.defs.has(node.op_type):
        return False
    return not onnx.defs.get_schema(node.op_type, opset).has_type_and_shape_inference_function


def _restate(model: ir.Model, value: ir.Value) -> None:
    assert value.shape is not None and value.dtype is not None
    sizes = [size if isinstance(size, int) else 0 for size in value.shape]
    shape = initializer(model, "_".join(("shape", *map(str, sizes))), np.array(sizes, np.int64))
    typed = ir.node("Cast", [value], {"to": int(value.dtype)})
    shaped = ir.node("Reshape", [typed.outputs[0], shape])
    typed.outputs[0].type = shaped.outputs[0].type = value.type
    shaped.outputs[0].shape = value.shape
    readers = [use for use in value.uses() if use.node is not typed]
    node = value.producer()
    assert node is not None
    for new in (typed, shaped):
        new.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, [typed, shaped])
    for use in readers:
        use.node.replace_input_with(use.idx, shaped.outputs[0])
