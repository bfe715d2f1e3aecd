"""Read an ONNX file without its weights' weight: a skeleton that is small enough to check, infer and inline at will."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from qcompile.errors import VerificationError
from qcompile.onnx.wire import parse_without_weights

# Larger payloads play no part in shape inference; the exporters keep anything that does (shapes, axes) far smaller.
SMALL_BYTES = 1024

_BITS: dict[int, int] = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model at `path`, with weights left on disk: those inside the file are external data in the file itself.

    Raises: OSError if it cannot be read, VerificationError if it is no ONNX file.
    """
    if os.path.getsize(path) == 0:
        raise VerificationError(f"'{os.fspath(path)}' is empty")
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        try:
            return parse_without_weights(view, os.path.basename(path), SMALL_BYTES)
        except DecodeError as error:
            raise VerificationError(f"'{os.fspath(path)}' is cut off or is no ONNX file: {error}") from error


def payload_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the elements of `tensor` take when packed, from its dims and element type."""
    count = 1
    for dim in tensor.dims:
        count *= dim
    bits = _BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (count * bits + 7) // 8


def is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def skeleton(model: onnx.ModelProto, base_dir: Path | None) -> onnx.ModelProto:
    """`model` with each large initializer as a graph input of the same name, type and shape.

    The checker, shape inference and the inliner copy the whole model through bytes at each call; on the skeleton of a
    ViT-base that is 40 kB instead of 85 MB. Small external tensors are read in, since inference may need their values.
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
        if is_external(tensor) and base_dir is not None and payload_bytes(tensor) <= SMALL_BYTES:
            graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor, str(base_dir)), tensor.name))
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
