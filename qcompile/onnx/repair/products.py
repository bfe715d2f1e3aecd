"""Zero points of the operands of GEMMs move behind them: into biases, where the other operand is a weight.

    before:  DQ -> Sub p -> Gemm, Conv (weight w, bias b)        after:  DQ -> Gemm, Conv (w, b - p sum(w))

Two products of activations, and a weight whose zero point does not fit its codes, subtract what is summed at run time:

    (a - p) @ (b - q)  =  a @ b  -  p colsum(b - q)  -  rowsum(a) q

A convolution pads with zeros, which are codes of p: its input is padded first, in numbers, and quantized again to the
same codes; a weight of it that does not fit is two. What does not fit any of this reads the subtraction, and is
multiplied in floating point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from qcompile.onnx.evaluate import Array
from qcompile.onnx.repair.integers import INTEGERS, along, code_type, dequantized
from qcompile.onnx.repair.legacy import DEQUANTIZE, MOVES, QUANTIZE, is_standard
from qcompile.onnx.repair.state import State, follow, insert

_FLOAT = ir.DataType.FLOAT


class Shifted(NamedTuple):
    """A tensor that is `raw - offset`: `raw` comes from a DQ without a zero point, `offset` is s z, in float32."""

    raw: ir.Value
    offset: Array


Offsets = dict[ir.Value, Shifted]


class _Operand(NamedTuple):
    """What a GEMM reads: `raw - offset` behind the operators of `path`, which move elements only."""

    raw: ir.Value
    offset: Array
    path: list[ir.Node]

    def weight(self, state: State) -> Array | None:
        """Its numbers, if they are stored and at most transposed."""
        dequantize = self.raw.producer()
        assert dequantize is not None
        values = dequantized(state, dequantize)
        if values is None or any(node.op_type != "Transpose" for node in self.path):
            return None
        values = values - self.offset
        for node in self.path:
            perm = node.attributes.get("perm")
            values = values.transpose(perm.as_ints() if perm is not None else None)
        return values

    def rebuilt(self, state: State) -> ir.Value:
        """The same without the offset: copies of the moves, as others may read the old ones."""
        value = self.raw
        for node in self.path if self.offset.any() else []:
            moved = insert(node, node.op_type, [value, *node.inputs[1:]], state, **dict(node.attributes))
            moved.type, moved.shape = value.type, node.outputs[0].shape
            value = moved
        return value if self.offset.any() or not self.path else self.path[-1].outputs[0]


def correct(state: State, offsets: Offsets) -> None:
    """Let GEMMs of two quantized operands multiply codes without zero points."""
    for node in state.nodes() if offsets else []:
        if is_standard(node, "MatMul", "Gemm", "Conv"):
            left, right = (_operand(node.inputs[index], offsets) for index in (0, 1))
            if left is not None and right is not None and (left.offset.any() or right.offset.any()):
                (_convolution if node.op_type == "Conv" else _product)(state, node, left, right)


def _operand(value: ir.Value | None, offsets: Offsets) -> _Operand | None:
    path: list[ir.Node] = []
    while value is not None:
        if value in offsets:
            return _Operand(*offsets[value], path)
        node = value.producer()
        if is_standard(node, DEQUANTIZE) and node is not None:
            return _Operand(value, np.zeros((), np.float32), path) if code_type(node) in INTEGERS else None
        if not is_standard(node, *MOVES) or node is None:
            return None
        path.insert(0, node)
        value = node.inputs[0]
    return None


def _product(state: State, gemm: ir.Node, left: _Operand, right: _Operand) -> None:
    transposed, alpha, weight = bool(_number(gemm, "transB", 0)), _number(gemm, "alpha", 1.0), right.weight(state)
    if _number(gemm, "transA", 0) or left.offset.size > 1 or not _along_columns(right, transposed):
        return
    if any(_rank(value) < 2 for value in gemm.inputs[:2]) or (weight is None and transposed):
        return
    terms: list[ir.Value] = []
    if left.offset.any() and weight is None:
        terms.append(_sums(state, gemm, gemm.inputs[1], -2, alpha * left.offset))
    elif left.offset.any() and weight is not None:
        sums = weight.sum(1 if transposed else -2, np.float64, keepdims=weight.ndim > 2)
        terms += _fixed(state, gemm, alpha * float(left.offset) * sums)
    raw = left.rebuilt(state), right.rebuilt(state)
    if right.offset.any():
        terms.append(_sums(state, gemm, raw[0], -1, alpha * right.offset))
    gemm.replace_input_with(0, raw[0])
    gemm.replace_input_with(1, raw[1])
    last: ir.Node | None = gemm
    for term in terms:
        assert last is not None
        last = follow(last, "Sub", [term], state).producer()


def _along_columns(weight: _Operand, transposed: bool) -> bool:
    """Whether its offset is one number, or one for each column of the product."""
    shape = weight.offset.shape
    return weight.offset.size <= 1 or (not weight.path and not transposed and len(shape) == 1)


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def _sums(state: State, gemm: ir.Node, value: ir.Value | None, axis: int, factor: Array) -> ir.Value:
    """`factor` times the sum of `value` along `axis`."""
    axes = state.initializer(f"sum_axis_{abs(axis)}", np.array([axis], np.int64))
    sums = insert(gemm, "ReduceSum", [value, axes], state, keepdims=1)
    scaled = state.initializer(f"{gemm.name}_offset", np.asarray(factor).astype(_numpy(gemm.inputs[0])))
    return insert(gemm, "Mul", [sums, scaled], state)


def _fixed(state: State, gemm: ir.Node, term: Array) -> list[ir.Value]:
    """Subtract `term` in the bias of a Gemm or Conv; what is left to subtract if there is none, or it is computed."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    stored = state.constant(bias) if bias is not None else np.zeros((), np.float32)
    dtype = _numpy(gemm.inputs[0])
    if gemm.op_type == "MatMul" or stored is None:
        return [state.initializer(f"{gemm.name}_correction", term.astype(dtype))]
    beta = _number(gemm, "beta", 1.0) if bias is not None else 0.0
    corrected = (stored.astype(np.float64) * beta - term).astype(dtype)
    if gemm.op_type == "Gemm":
        gemm.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    gemm.resize_inputs(3)
    gemm.replace_input_with(2, state.initializer(f"{gemm.name}_bias", corrected))
    return []


def _convolution(state: State, conv: ir.Node, left: _Operand, right: _Operand) -> None:
    weight, shifted = right.weight(state), bool(left.offset.any())
    if weight is None or left.path or right.path or left.offset.size > 1:
        return
    pads = _pads(conv, weight.shape[2:]) if shifted else []
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if pads is None or (bias is not None and not state.is_constant(bias)):
        return
    if shifted:
        _fixed(state, conv, float(left.offset) * weight.reshape(weight.shape[0], -1).sum(1, np.float64))
    if any(pads):
        conv.replace_input_with(0, _padded(state, conv, left, pads))
        conv.attributes.pop("auto_pad", None)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    else:
        conv.replace_input_with(0, left.raw)
    if right.offset.any():
        _split(state, conv, right)


def _pads(conv: ir.Node, kernel: tuple[int, ...]) -> list[int] | None:
    """What `conv` pads before each spatial axis, then behind each; None where that depends on a size at run time."""
    stated, automatic = conv.attributes.get("pads"), conv.attributes.get("auto_pad")
    how = automatic.as_string() if automatic is not None else "NOTSET"
    if not how.startswith("SAME"):
        return list(stated.as_ints()) if stated is not None and how == "NOTSET" else []
    x = conv.inputs[0]
    sizes = [] if x is None or x.shape is None else [*x.shape][2:]
    steps, dilations = (
        list(conv.attributes[name].as_ints()) if name in conv.attributes else [1] * len(kernel)
        for name in ("strides", "dilations")
    )
    if len(sizes) != len(kernel) or not all(isinstance(size, int) for size in sizes):
        return None
    before, behind = [], []
    for size, taps, step, dilation in zip(sizes, kernel, steps, dilations, strict=True):
        assert isinstance(size, int)
        total = max((-(-size // step) - 1) * step + (taps - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if how == "SAME_UPPER" else more)
        behind.append(more if how == "SAME_UPPER" else less)
    return before + behind


def _split(state: State, conv: ir.Node, weight: _Operand) -> None:
    """A weight of 9 bits is a sum of two of 8, and its convolution one of two."""
    old = weight.raw.producer()
    codes, scale = (state.constant(value) for value in (old.inputs[:2] if old is not None else ()))
    assert old is not None and codes is not None and scale is not None
    exact = codes - np.rint(weight.offset / along(scale, codes.shape, old)).astype(np.int64)
    near = exact.clip(-128, 127)
    parts = []
    for part in (near, exact - near):
        stored = state.initializer(f"{conv.name}_weight", part.astype(np.int8))
        parts.append(insert(conv, DEQUANTIZE, [stored, *old.inputs[1:]], state, **dict(old.attributes)))
    rest = insert(conv, "Conv", [conv.inputs[0], parts[1]], state, **dict(conv.attributes))
    conv.replace_input_with(1, parts[0])
    follow(conv, "Add", [rest], state)


def _padded(state: State, conv: ir.Node, x: _Operand, pads: list[int]) -> ir.Value:
    """The input with zeros around it, quantized as it was."""
    rank, old = len(pads) // 2, x.raw.producer()
    assert old is not None
    sizes = state.initializer("pads", np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64))
    padded = insert(conv, "Pad", [conv.inputs[0], sizes], state)
    padded.type = conv.inputs[0].type if conv.inputs[0] is not None else None
    codes = insert(conv, QUANTIZE, [padded, *old.inputs[1:]], state)
    quantize = codes.producer()
    assert quantize is not None
    codes.type = ir.TensorType(ir.DataType.INT8)
    quantize_shifted(state, quantize, x.offset)
    dequantized = insert(conv, DEQUANTIZE, [codes, *old.inputs[1:]], state)
    dequantized.type = x.raw.type
    return dequantized


def quantize_shifted(state: State, node: ir.Node, offset: Array) -> None:
    """Let a Q without a zero point quantize its input plus `offset`, in float32."""
    x = node.inputs[0]
    if x is None or x.dtype is not _FLOAT:
        x = insert(node, "Cast", [x], state, to=int(_FLOAT))
    node.replace_input_with(0, insert(node, "Add", [x, state.initializer(f"{node.name}_offset", offset)], state))
    widen_scale(state, node)


def widen_scale(state: State, node: ir.Node) -> None:
    """Give a Q or DQ its scale in float32."""
    scale, value = state.constant(node.inputs[1]), node.inputs[1]
    assert scale is not None and value is not None
    if scale.dtype != np.float32:
        node.replace_input_with(1, state.initializer(f"{value.name}_float", scale.astype(np.float32)))


def _number(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _numpy(value: ir.Value | None) -> Any:
    """The numpy type of a tensor of a known type."""
    assert value is not None and value.dtype is not None
    return value.dtype.numpy()
