"""INT4 in ONNX: codes as INT4 tensors, two in a byte.

torch.onnx has no type for them, so the program is converted with a byte for each code, `int8 [K, N]`, and what a
DequantizeLinear in blocks reads of that type is packed here: no other format has it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from torch.export import ExportedProgram

from passes.formats import INT4_GROUPS, get_format
from passes.ir import DEQUANTIZE
from passes.subgraphs import all_calls
from qcompile.onnx.initializers import copied, taken_names

__all__ = ["INT4_OPSET", "pack_int4", "uses_int4"]

INT4_OPSET = 21


def uses_int4(program: ExportedProgram) -> bool:
    """Whether any weight of `program` is INT4."""
    formats = {get_format(str(node.kwargs["format"])) for node in all_calls(program.graph_module, DEQUANTIZE)}
    return not formats.isdisjoint(INT4_GROUPS.values())


def pack_int4(model: onnx_ir.Model) -> None:
    """Give the codes of INT4 weights their type, in place, and each reader its own."""
    weights = []
    for node in model.graph.all_nodes():
        block = node.attributes.get("block_size")  # 0 where there are none
        if node.op_type != "DequantizeLinear" or block is None or not block.as_int():
            continue
        codes = node.inputs[0]
        if codes is not None and codes.const_value is not None and codes.dtype is onnx_ir.DataType.INT4:
            weights.append(node)  # another reader of what is packed already
        if codes is None or codes.const_value is None or codes.dtype is not onnx_ir.DataType.INT8:
            continue
        shape = onnx_ir.Shape(codes.const_value.shape.numpy())
        low_high = codes.const_value.numpy().view(np.uint8).reshape(-1) & 15
        if low_high.size % 2:
            low_high = np.append(low_high, np.uint8(0))
        packed = low_high[::2] | low_high[1::2] << 4
        codes.const_value = onnx_ir.PackedTensor(packed, onnx_ir.DataType.INT4, shape=shape, name=codes.name)
        codes.dtype = onnx_ir.DataType.INT4
        weights.append(node)
    _separate(model, weights)


def _separate(model: onnx_ir.Model, weights: list[onnx_ir.Node]) -> None:
    """Give each of the DequantizeLinear `weights` codes and scales of its own.

    The exporter stores equal numbers once, and ONNX Runtime fuses no weight a part of which another node reads.
    """
    read, taken = set[onnx_ir.Value](), taken_names(model)
    for node in weights:
        for index, value in enumerate(node.inputs):
            if value is not None and value in read:
                node.replace_input_with(index, copied(model, value, taken))
            elif value is not None:
                read.add(value)
