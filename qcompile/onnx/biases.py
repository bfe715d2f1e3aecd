"""Biases of quantized linear layers as `[1, N]` or `[1, 1, N]`: with `[N]`, ONNX Runtime's default session gives wrong
numbers, or those of a float GEMM.

    before:  MatMul(DQ, DQ) -> Add(bias [N])                        [-> Reshape, Relu, ...] -> QuantizeLinear
    after:   MatMul(DQ, DQ) -> Add(bias [1, N])                     [-> Reshape, Relu, ...] -> QuantizeLinear
    after, INT8 of two axes:
             MatMul(DQ, DQ) -> Add(bias [1, 1, N]) -> Squeeze(0)    [-> Reshape, Relu, ...] -> QuantizeLinear

ONNX Runtime 1.31 and 1.32 make a Gemm of MatMul and Add, and then, at every level but "disabled", quantize its bias to
INT32 with the scale of the product if its output is quantized: in float16 whatever is above 65504 of those scales is
rubbish, and in float32 FP8 loses what is below half of one. With INT8 on a 3-D input the session does not even load.
`[1, N]` broadcasts to the same numbers from two axes on, and none of that happens: from three axes on. Of two axes it
makes a Gemm of `[1, N]`, too, and dequantizes the INT8 weight when it loads, for a float GEMM that takes 3.4 times as
long and four times the memory. `[1, 1, N]` keeps Add and MatMul apart, and the integer kernel is found.

A bias of an FP8 layer that no quantizer follows stays: ONNX Runtime 1.31 has no kernel for what it would make of it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.initializers import initializer
from qcompile.onnx.moves import FP8, is_operator, quantizers, sources

_SUFFIXES = {2: "_row", 3: "_row_3d"}  # axes -> of the name of a bias with them
_LIKE_MOVES = {"Relu", "Clip", "Max", "Min"}


def biases_to_rows(model: ir.Model) -> int:
    """Store the biases so, in place. Returns how many layers read one.

    *Requires*: shapes of the products are known, as far as they have to be.
    """
    quantized = {node for quantize in quantizers(model) for node in sources(quantize, _LIKE_MOVES)}
    rows = [node for node in model.graph.all_nodes() if is_operator(node, "Add") and _is_bias(node, node in quantized)]
    for add in rows:
        index = _bias_index(add)
        bias, product = add.inputs[index], add.inputs[1 - index]
        assert bias is not None and product is not None and product.shape is not None
        flat = len(product.shape) == 2 and product.dtype is ir.DataType.FLOAT and _is_int8(product)
        add.replace_input_with(index, _stored(model, bias, axes=3 if flat else 2))
        if flat:
            _squeeze(model, add)
    for name, value in list(model.graph.initializers.items()):
        stored = any(f"{name}{suffix}" in model.graph.initializers for suffix in _SUFFIXES.values())
        if stored and not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return len(rows)


def _bias_index(add: ir.Node) -> int:
    return int(is_operator(_producer(add.inputs[0]), "MatMul"))


def _is_bias(add: ir.Node, is_quantized: bool) -> bool:
    product, bias = add.inputs[1 - _bias_index(add)], add.inputs[_bias_index(add)]
    if product is None or product.shape is None or not is_operator(product.producer(), "MatMul"):
        return False
    if bias is None or bias.const_value is None or bias.is_graph_output():
        return False
    if len(bias.const_value.shape) != 1 or len(product.shape) < 2:
        return False
    return _is_int8(product) or (is_quantized and bool(FP8 & _operands(product)))


def _is_int8(product: ir.Value) -> bool:
    return ir.DataType.INT8 in _operands(product)


def _operands(product: ir.Value) -> set[ir.DataType | None]:
    """What the two operands of the MatMul `product` are dequantized from."""
    matmul = product.producer()
    assert matmul is not None
    return {_codes(operand) for operand in matmul.inputs}


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


def _stored(model: ir.Model, bias: ir.Value, axes: int) -> ir.Value:
    """`bias` `[N]` with axes of one element in front."""
    tensor = bias.const_value
    assert tensor is not None
    shape = (1,) * (axes - 1) + (-1,)
    return initializer(model, f"{bias.name}{_SUFFIXES[axes]}", tensor.numpy().reshape(shape), tensor.dtype)


def _squeeze(model: ir.Model, add: ir.Node) -> None:
    """Add in three axes, then take the first off: what others read keeps its name and shape."""
    (result,) = add.outputs
    assert result.shape is not None and add.graph is not None
    wide = ir.Node("", "Add", add.inputs, name=add.name, metadata_props=add.metadata_props)
    wide.outputs[0].name, wide.outputs[0].type = f"{result.name}_3d", result.type
    wide.outputs[0].shape = ir.Shape([1, *result.shape])
    axis = initializer(model, "first_axis", np.array([0]), ir.DataType.INT64)
    squeeze = ir.Node("", "Squeeze", [wide.outputs[0], axis], metadata_props=add.metadata_props)
    ir.convenience.replace_nodes_and_values(add.graph, add, [add], [wide, squeeze], [result], squeeze.outputs)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None
