"""What is left to do on the ONNX model after torch.onnx wrote it."""

from __future__ import annotations

import onnx_ir
import torch

from qcompile.onnx.initializers import initializer
from qcompile.onnx.int4 import pack_int4
from qcompile.onnx.names import NAME_SCOPES


def tidy(model: onnx_ir.Model) -> None:
    """Store per-channel scales flat and zero points of INT8 weights apart, and keep of the exporter's notes only the
    module path of each node.

    The notes hold stack traces with paths of the machine that exported, and are larger than the graph.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _flatten_scale(model, node)
            _own_zero_point(model, node)
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in model.graph.initializers.values():
        _keep_packed(value)
    pack_int4(model)
    _drop_unused_initializers(model)


def _flatten_scale(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    """Replace `Reshape(initializer, [-1])` on the scale input by an initializer of that shape."""
    scale = node.inputs[1]
    reshape = scale.producer() if scale is not None else None
    if scale is None or reshape is None or reshape.op_type != "Reshape":
        return
    source = reshape.inputs[0]
    assert source is not None and source.const_value is not None and source.name is not None
    flat = source.const_value.numpy().reshape(-1)
    node.replace_input_with(1, initializer(model, f"{source.name}_flat", flat, source.const_value.dtype))
    if not scale.uses():
        model.graph.remove(reshape, safe=True)


def _own_zero_point(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    """Give an INT8 weight zero points of its own, which torch.onnx shares with others of that many channels.

    With `session.x64quantprecision` ONNX Runtime 1.31 makes uint8 of both, by the name of the zero points, and refuses
    the file where that exists already.
    """
    codes, _, zero = (*node.inputs, None)[:3]
    if zero is None or zero.const_value is None or codes is None or codes.const_value is None:
        return
    if codes.dtype is not onnx_ir.DataType.INT8 or len(zero.uses()) < 2:
        return
    # a weight that is dequantized twice has one
    own = initializer(model, f"{codes.name}_zero_point", zero.const_value.numpy(), zero.const_value.dtype)
    node.replace_input_with(2, own)


def _keep_packed(value: onnx_ir.Value) -> None:
    """Write FP4 codes as they are stored, two in a byte; torch.onnx would unpack and pack them again."""
    tensor = value.const_value
    if value.dtype is onnx_ir.DataType.FLOAT4E2M1 and tensor is not None and isinstance(tensor.raw, torch.Tensor):
        packed = tensor.raw.view(torch.uint8).numpy()
        value.const_value = onnx_ir.PackedTensor(
            packed, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=tensor.name
        )


def _drop_unused_initializers(model: onnx_ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
