"""Models without their weights' weight: a skeleton that is small enough to check, infer and inline at will."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import helper

from qcompile.onnxfile.payload import SMALL_BYTES, embedded, is_external, payload_bytes


def skeleton(model: onnx.ModelProto, path: Path | None) -> onnx.ModelProto:
    """`model` with each large initializer as a graph input of the same name, type and shape.

    The checker, shape inference and the inliner copy the whole model through bytes at each call; on the skeleton of a
    ViT-base that is 40 kB instead of 85 MB. Small external tensors are read in, since inference may need their values:
    from beside `path`, the model's file.
    """
    result = onnx.ModelProto()
    result.ir_version = model.ir_version
    result.opset_import.extend(model.opset_import)
    result.functions.extend(model.functions)
    result.metadata_props.extend(model.metadata_props)
    source, graph = model.graph, result.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    graph.sparse_initializer.extend(source.sparse_initializer)
    declared = {value.name for value in source.input}
    for tensor in source.initializer:
        if is_external(tensor) and path is not None and payload_bytes(tensor) <= SMALL_BYTES:
            graph.initializer.append(embedded(tensor, path))
        elif not is_external(tensor) and len(tensor.raw_data) <= SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return result


@contextlib.contextmanager
def without_weights(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """A proto of `model` with each large initializer as an input: inference copies all that it is given."""
    graph, inputs = model.graph, list(model.graph.inputs)
    large = [v for v in graph.initializers.values() if v.const_value is None or v.const_value.nbytes > SMALL_BYTES]
    tensors = [value.const_value for value in large]
    try:
        for value, tensor in zip(large, tensors, strict=True):
            if tensor is not None and value.shape is None:
                value.shape, value.type = ir.Shape(list(tensor.shape.numpy())), ir.TensorType(tensor.dtype)
            del graph.initializers[str(value.name)]
            value.const_value = None
            if value not in inputs:
                graph.inputs.append(value)
        proto = ir.serde.serialize_model(model)
    finally:
        graph.inputs[:] = inputs
        for value, tensor in zip(large, tensors, strict=True):
            value.const_value = tensor
            graph.register_initializer(value)
    yield proto
