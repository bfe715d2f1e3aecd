"""Operators on codes, of ONNX Runtime's QOperator format, become Q/DQ around the standard operator that they compute.

    before:  x, sx, zx, w, sw, zw, sy, zy, bias (int32)  -> QLinearConv -> y
    after:   x -> DQ (sx, zx), w -> DQ (sw, zw)          -> Conv (bias sx sw) -> Q (sy, zy) -> y

*Ensures*: the real numbers that the operator defines; ONNX Runtime's own kernels round some of them by one code
elsewhere. *Declines*: scales that are computed, channels last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.repair.legacy import DEQUANTIZE, MICROSOFT, QUANTIZE, describe
from qcompile.onnx.repair.state import State, insert
from qcompile.onnx.view import STANDARD_DOMAINS


class _Form(NamedTuple):
    """A standard operator with `inputs` operands as (codes, scale, zero point), from `first` on, and its output's."""

    operator: str
    inputs: int
    output: int  # where (scale, zero point) of the output are
    first: int = 0
    bias: int | None = None


_FORMS = {
    "QLinearConv": _Form("Conv", 2, 6, bias=8),
    "QLinearMatMul": _Form("MatMul", 2, 6),
    "QGemm": _Form("Gemm", 2, 7, bias=6),
    "QLinearAdd": _Form("Add", 2, 6),
    "QLinearMul": _Form("Mul", 2, 6),
    "QLinearSigmoid": _Form("Sigmoid", 1, 3),
    "QLinearLeakyRelu": _Form("LeakyRelu", 1, 3),
    "QLinearSoftmax": _Form("Softmax", 1, 3),
    "QLinearAveragePool": _Form("AveragePool", 1, 3),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", 1, 3),
    "QLinearConcat": _Form("Concat", 0, 0, first=2),
}
_OWN = {"channels_last", "opset"}  # attributes that the standard operators have not


def is_qoperator(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether `node` computes on codes and is one of those that this can write in standard operators."""
    return node.op_type in _FORMS and node.domain in (*STANDARD_DOMAINS, MICROSOFT)


def expand_qoperators(state: State) -> None:
    """*Ensures*: see above."""
    for node in state.nodes():
        if is_qoperator(node) and not _is_declined(state, node):
            _expand(state, node, _FORMS[node.op_type])


def _is_declined(state: State, node: ir.Node) -> bool:
    form = _FORMS[node.op_type]
    needed = [i for start in range(form.first, _end(node, form), 3) for i in (start, start + 1)]
    needed += [form.output] if form.operator != "Gemm" else []  # QGemm may leave out the scale of its output
    if any(index >= len(node.inputs) or node.inputs[index] is None for index in needed):
        raise RepairError(f"{describe(node)} lacks some of its codes and scales")
    scales = [*range(form.first + 1, _end(node, form), 3), form.output]
    values = [node.inputs[index] for index in scales if index < len(node.inputs)]
    channels_last = node.attributes.get("channels_last")
    computed = any(value is not None and not state.is_constant(value) for value in values)
    return computed or (channels_last is not None and bool(channels_last.as_int()))


def _end(node: ir.Node, form: _Form) -> int:
    return form.first + 3 * form.inputs if form.inputs else len(node.inputs)


def _expand(state: State, node: ir.Node, form: _Form) -> None:
    domain = f"{node.domain}::" if node.domain else ""
    state.changes.standardized[f"{domain}{node.op_type}"] += 1
    triples = [tuple(node.inputs[i : i + 3]) for i in range(form.first, _end(node, form), 3)]
    axes = {1: 0 if form.operator == "Conv" else -1}
    if form.operator == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
        axes[1] = 0
    operands = [
        insert(node, DEQUANTIZE, list(triple), state, **_axis(state, triple[1], axes.get(index, 1)))
        for index, triple in enumerate(triples)
    ]
    if form.bias is not None and form.bias < len(node.inputs) and node.inputs[form.bias] is not None:
        operands.append(_bias(state, node, form.bias, triples))
    made = {name: value for name, value in node.attributes.items() if name not in _OWN}
    scale, zero = (node.inputs[i] if i < len(node.inputs) else None for i in (form.output, form.output + 1))
    if scale is None:  # QGemm without: its output is float
        _become(node, form.operator, list(operands), made)
        return
    result = insert(node, form.operator, list(operands), state, **made)
    _become(node, QUANTIZE, [result, scale, zero] if zero is not None else [result, scale], {})


def _axis(state: State, scale: ir.Value | None, axis: int) -> dict[str, int]:
    values = state.constant(scale)
    return {"axis": axis} if values is not None and values.size > 1 else {}


def _bias(state: State, node: ir.Node, index: int, triples: list[tuple[ir.Value | None, ...]]) -> ir.Value:
    """The DQ of a bias whose scale is the product of those of its operands, and of `alpha`."""
    bias, scales = node.inputs[index], [state.constant(triple[1]) for triple in triples]
    assert bias is not None and scales[0] is not None and scales[1] is not None
    product = (scales[0].astype(np.float64).reshape(-1)[0] * scales[1].astype(np.float64)).astype(scales[0].dtype)
    if product.size == 1:
        product = product.reshape(())
    scale = state.initializer(f"{bias.name}_scale", product)
    return insert(node, DEQUANTIZE, [bias, scale], state, **({"axis": 0} if product.ndim else {}))


def _become(node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, ir.Attr]) -> None:
    node.op_type, node.domain = op_type, ""
    node.attributes.clear()
    node.attributes.update(attributes)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
