"""Codes of a layer that stands in several graphs: each graph has its own.

    before:  If (x -> MatMul(x, DQ(w)), x -> Relu(MatMul(x, DQ(w))))
    after:   If (x -> MatMul(x, DQ(w)), x -> Relu(MatMul(x, DQ(w_1))))

TensorRT-RTX 1.7.1 refuses codes that two graphs read: "Quantized constant is only allowed before DQ".
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.onnx.initializers import copied, taken_names
from qcompile.onnx.moves import is_operator


def separate_codes(model: ir.Model) -> int:
    """Copy codes that graphs share, in place. Returns how many copies there are."""
    readers: dict[ir.Value, dict[ir.Graph | None, list[ir.Node]]] = {}
    for node in model.graph.all_nodes():
        codes = node.inputs[0] if is_operator(node, "DequantizeLinear") else None
        if codes is not None and codes.is_initializer():
            graph = node.graph
            assert not isinstance(graph, ir.Function)
            readers.setdefault(codes, {}).setdefault(graph, []).append(node)
    count, taken = 0, taken_names(model)
    for codes, by_graph in readers.items():
        for nodes in list(by_graph.values())[1:]:
            own = copied(model, codes, taken)
            for node in nodes:
                node.replace_input_with(0, own)
            count += 1
    return count
