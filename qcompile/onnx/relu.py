"""Relus that ONNX Runtime drops, or that keep it from a product, written as Max.

    before:  x    -> Relu [-> Reshape, Transpose, ...] -> QuantizeLinear (FP8) -> DequantizeLinear -> MatMul
    after:   x, 0 -> Max  [-> Reshape, Transpose, ...] -> QuantizeLinear (FP8) -> DequantizeLinear -> MatMul
    before:  MatMul(x, DequantizeLinear(INT4)) -> Relu
    after:   MatMul(x, DequantizeLinear(INT4)), 0 -> Max

From "extended" on, its default included, ONNX Runtime 1.31 and 1.32 remove a Relu that only a QuantizeLinear reads, as
if its zero point of 0 cut off negatives: true of uint8, not of FP8. Moves between the two do not help: Q is propagated
through them, or they are dropped first. `Max(x, 0)` gives the same numbers, NaN and infinities included, and TensorRT
runs it in the same kernels. ONNX Runtime's Clip would make the largest finite number of an infinity, and a Q without a
zero point, which it leaves alone, is one that TensorRT takes for INT8.

The same releases make MatMulNBits of a product with an INT4 weight, but not of one in front of a Relu that leads to
another such product: that weight they dequantize at every call.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.onnx.initializers import initializer
from qcompile.onnx.moves import FP8, is_operator, quantizers, sources


def dropped_relus(model: ir.Model) -> list[ir.Node]:
    """The Relus of the graph and its subgraphs that ONNX Runtime may drop above "basic"."""
    found = (node for q in quantizers(model) if _makes_fp8(q) for node in sources(q) if node.op_type == "Relu")
    return list(dict.fromkeys(found))


def relus_to_max(model: ir.Model) -> int:
    """Write the `dropped_relus`, and those right behind a product with an INT4 weight, as Max, in place.

    Returns how many. One whose type nobody knows stays.
    """
    relus = [node for node in [*dropped_relus(model), *_behind_int4(model)] if _type(node) is not None]
    for node in relus:
        dtype = _type(node)
        assert dtype is not None
        node.op_type = "Max"
        node.resize_inputs(2)
        node.replace_input_with(1, _zero(model, dtype))
    return len(relus)


def _behind_int4(model: ir.Model) -> list[ir.Node]:
    """The Relus that read a MatMul of INT4 codes."""
    found = []
    for node in model.graph.all_nodes():
        product = _producer(node.inputs[0]) if is_operator(node, "Relu") else None
        if product is None or not is_operator(product, "MatMul"):
            continue
        weight = _producer(product.inputs[1])
        if is_operator(weight, "DequantizeLinear") and weight.inputs[0].dtype is ir.DataType.INT4:  # type: ignore[union-attr]
            found.append(node)
    return found


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _type(relu: ir.Node) -> ir.DataType | None:
    (x,) = relu.inputs
    return (x.dtype if x is not None else None) or relu.outputs[0].dtype


def _makes_fp8(quantize: ir.Node) -> bool:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    stated = quantize.attributes.get("output_dtype")
    return (zero is not None and zero.dtype in FP8) or (stated is not None and stated.as_int() in FP8)


def _zero(model: ir.Model, dtype: ir.DataType) -> ir.Value:
    """A scalar 0, one for each type."""
    return initializer(model, f"relu_zero_{dtype.name.lower()}", np.zeros((), dtype.numpy()), dtype)
