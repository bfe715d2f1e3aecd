"""Constants that a file computes, computed here: by operators whose cost is known before, up to a bounded size.

A stranger's file of a few kilobytes may ask for a constant of any size (ConstantOfShape, Expand, Tile, Range), for a
loop without an end, or for so long a way to one number that recursion does not reach it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qcompile.errors import QCompileError, VerificationError
from qcompile.onnx.names import describe
from qcompile.onnxfile.names import said

Array = npt.NDArray[Any]

_LEAST_BYTES = 64 << 20
# Codes of a weight become floats, and pass through a few operators on their way to what is folded.
_TIMES_STORED = 64

# What makes no more than it is given, each element of it once.
_KEEPING = frozenset(
    {
        *("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Concat"),
        *("Abs", "Neg", "Sign", "Sqrt", "Reciprocal", "Exp", "Log", "Floor", "Ceil", "Round", "Not", "Relu", "Tanh"),
        *("Sigmoid", "Clip", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceProd", "Shape", "Size"),
        *("Constant", "QuantizeLinear", "DequantizeLinear", "IsNaN", "IsInf", "Erf", "Softmax", "Trilu"),
    }
)
_BROADCASTING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "And", "Or", "Xor", "Where", "CastLike"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitShift", "BitwiseAnd", "BitwiseOr"),
    }
)


def _repeated(inputs: Sequence[Array], node: onnx.NodeProto) -> int:
    shape, repeats = inputs[0].shape, [int(number) for number in inputs[1].ravel()]
    return int(math.prod(shape) * math.prod(repeats))


def _expanded(inputs: Sequence[Array], node: onnx.NodeProto) -> int:
    return _broadcast([inputs[0].shape, [int(size) for size in inputs[1].ravel()]])


def _filled(inputs: Sequence[Array], node: onnx.NodeProto) -> int:
    return int(math.prod(int(size) for size in inputs[0].ravel()))


def _ranged(inputs: Sequence[Array], node: onnx.NodeProto) -> int:
    start, limit, delta = (array.item() for array in inputs)
    return int(max(math.ceil((limit - start) / delta), 0))


def _gathered(inputs: Sequence[Array], node: onnx.NodeProto) -> int:
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
    return int(inputs[0].size // max(inputs[0].shape[axis], 1) * inputs[1].size)


_GROWING: dict[str, Callable[[Sequence[Array], onnx.NodeProto], int]] = {
    "Tile": _repeated,
    "Expand": _expanded,
    "ConstantOfShape": _filled,
    "Range": _ranged,
    "Gather": _gathered,
}


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of what is broadcast from `shapes`, at most."""
    rank = max(map(len, shapes), default=0)
    full = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return int(math.prod(max(sizes) for sizes in zip(*full, strict=True)))


def can_compute(op_type: str) -> bool:
    """Whether the size of what a standard operator makes, and its time, are known before."""
    return op_type in _KEEPING or op_type in _BROADCASTING or op_type in _GROWING


def _elements(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    if (count := _GROWING.get(node.op_type)) is not None:
        return count(inputs, node)
    if node.op_type in _BROADCASTING:
        return _broadcast([array.shape for array in inputs])
    return sum(array.size for array in inputs)


@dataclass(frozen=True)
class Computation:
    """How `name` is computed: what is stored, and the nodes from there, in order. It outlives the graph."""

    name: str
    stored: Mapping[str, Callable[[], Array]]
    nodes: Sequence[onnx.NodeProto]
    opset: int

    def __call__(self, error: type[QCompileError] = VerificationError) -> Array:
        """Raises `error`, naming the node, where a constant is out of all proportion to what is stored, or none."""
        left = Counter(name for node in self.nodes for name in {*node.input} - {""})
        known: dict[str, Array] = {}
        room = _LEAST_BYTES
        for node in self.nodes:
            for name in {*node.input} - {""} - known.keys():
                known[name] = self.stored[name]()
                room += _TIMES_STORED * known[name].nbytes
            feeds = {name: known[name] for name in node.input if name}
            room -= self._bytes(node, feeds, error)
            if room < 0:
                raise error(
                    f"{describe(node)} computes a constant that is out of proportion to what the file stores: more "
                    f"than {_LEAST_BYTES >> 20} MB and {_TIMES_STORED} times that"
                )
            wanted = [name for name in node.output if name and (left[name] or name == self.name)]
            known.update(zip(wanted, self._run(node, feeds, wanted, error), strict=True))
            left.subtract(feeds.keys())
            for name in feeds:
                if not left[name] and name != self.name:
                    del known[name]
        return known[self.name] if self.nodes else self.stored[self.name]()

    def _bytes(self, node: onnx.NodeProto, feeds: Mapping[str, Array], error: type[QCompileError]) -> int:
        inputs = [feeds[name] for name in node.input if name]
        try:
            count = _elements(node, inputs)
        except (ValueError, ArithmeticError, IndexError, TypeError) as problem:
            raise self._failed(node, problem, error) from problem
        return max(count, 0) * max(4, *(array.itemsize for array in inputs), 4)

    def _run(
        self, node: onnx.NodeProto, feeds: Mapping[str, Array], wanted: list[str], error: type[QCompileError]
    ) -> list[Array]:
        imports = [helper.make_opsetid("", self.opset)]
        try:
            function = helper.make_function("", "c", list(feeds), wanted, [node], imports)
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(function).run(None, dict(feeds), attributes={})
        except Exception as problem:  # whatever onnx's evaluator, and numpy below it, make of wrong shapes and types
            raise self._failed(node, problem, error) from problem
        return [np.asarray(result) for result in results]

    def _failed(self, node: onnx.NodeProto, problem: Exception, error: type[QCompileError]) -> QCompileError:
        return error(f"{describe(node)} has constant inputs that it cannot compute with: {said(problem)}")
