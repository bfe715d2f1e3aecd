"""Biases of quantized linear layers as `[1, N]`: with `[N]`, ONNX Runtime's default session gives wrong numbers.

    before:  MatMul(DQ, DQ) -> Add(bias [N])       [-> Reshape, Relu, ...] -> QuantizeLinear
    after:   MatMul(DQ, DQ) -> Add(bias [1, N])    [-> Reshape, Relu, ...] -> QuantizeLinear

ONNX Runtime 1.31 and 1.32 make a Gemm of MatMul and Add, and then, at every level but "disabled", quantize its bias to
INT32 with the scale of the product if its output is quantized: in float16 whatever is above 65504 of those scales is
rubbish, and in float32 FP8 loses what is below half of one. With INT8 on a 3-D input the session does not even load.
`[1, N]` broadcasts to the same numbers from two axes on, and none of that happens.

A bias of an FP8 layer that no quantizer follows stays: ONNX Runtime 1.31 has no kernel for what it would make of it.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.onnx.initializers import initializer
from qcompile.onnx.moves import FP8, is_operator, quantizers, sources

_LIKE_MOVES = {"Relu", "Clip", "Max", "Min"}


def biases_to_rows(model: ir.Model) -> int:
    """Store the biases so, in place. Returns how many layers read one.

    *Requires*: shapes of the products are known, as far as they have to be.
    """
    quantized = {node for quantize in quantizers(model) for node in sources(quantize, _LIKE_MOVES)}
    rows = [node for node in model.graph.all_nodes() if is_operator(node, "Add") and _is_bias(node, node in quantized)]
    for add in rows:
        index = _bias_index(add)
        bias = add.inputs[index]
        assert bias is not None
        add.replace_input_with(index, _row(model, bias))
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and f"{name}_row" in model.graph.initializers:
            del model.graph.initializers[name]
    return len(rows)


def _bias_index(add: ir.Node) -> int:
    return int(is_operator(_producer(add.inputs[0]), "MatMul"))


def _is_bias(add: ir.Node, is_quantized: bool) -> bool:
    product, bias = add.inputs[1 - _bias_index(add)], add.inputs[_bias_index(add)]
    matmul = _producer(product)
    if not is_operator(matmul, "MatMul") or bias is None or bias.const_value is None or bias.is_graph_output():
        return False
    assert matmul is not None and product is not None
    codes = {_codes(operand) for operand in matmul.inputs}
    if len(bias.const_value.shape) != 1 or product.shape is None or len(product.shape) < 2:
        return False
    return ir.DataType.INT8 in codes or (is_quantized and bool(FP8 & codes))


def _codes(operand: ir.Value | None) -> ir.DataType | None:
    """The type that `operand` is dequantized from."""
    node = _producer(operand)
    while is_operator(node, "Transpose"):
        assert node is not None
        node = _producer(node.inputs[0])
    if not is_operator(node, "DequantizeLinear"):
        return None
    assert node is not None
    types = [value.dtype for value in (node.inputs[0], *node.inputs[2:]) if value is not None]
    return next((dtype for dtype in types if dtype is not None), None)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _row(model: ir.Model, bias: ir.Value) -> ir.Value:
    tensor = bias.const_value
    assert tensor is not None
    return initializer(model, f"{bias.name}_row", tensor.numpy().reshape(1, -1), tensor.dtype)
