"""An index over an ONNX file: who makes and reads a tensor, what is constant, what is quantized, module paths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from qcompile.errors import EngineError
from qcompile.onnxfile.payload import element_bits
from qcompile.onnxfile.read import payload_problems, read_onnx
from qcompile.onnxfile.scopes import NAME_SCOPES, read_scopes

# Operators that move or retype a tensor without changing what it holds.
MOVES = frozenset(
    {
        *("Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity"),
        *("Slice", "Split", "Gather", "Concat", "Dropout"),
    }
)
# A search over the graph gives up after so many nodes in a row.
REACH = 16
# No constant that a shape depends on is larger; the values of larger ones are weights, which nothing here looks at.
_KEEP_BYTES = 4096


def node_name(node: onnx.NodeProto) -> str:
    """The name that the builder uses for a node: its own, or one made from its first output."""
    return str(node.name) or f"node_of_{node.output[0] if node.output else ''}"


def module_path(node: onnx.NodeProto) -> str:
    """The module path in the node's metadata (second last of the exporter's name scopes), else the node's name."""
    for entry in node.metadata_props:
        if entry.key == NAME_SCOPES:
            scopes = read_scopes(entry.value) or []
            if len(scopes) >= 2 and scopes[-2]:
                return scopes[-2]
    return node_name(node)


def place(node: onnx.NodeProto) -> str:
    """Where a node is, for people: its module path and name, or its name alone where no module is known."""
    path, name = module_path(node), node_name(node)
    return f"{node.op_type} '{name}'" if path == name else f"{path} (node {name})"


class OnnxGraph:
    """The main graph of an ONNX model, indexed. Bodies of If, Loop and functions are not looked into."""

    def __init__(self, model: onnx.ModelProto, path: Path | None = None) -> None:
        self.model, self.path = model, path
        self.nodes = list(model.graph.node)
        self._producer = {out: node for node in self.nodes for out in node.output if out}
        self._modules = {node_name(node): module_path(node) for node in self.nodes}
        self._types = {init.name: init.data_type for init in model.graph.initializer}
        self._dims = {init.name: tuple(init.dims) for init in model.graph.initializer}
        self._constants = set(self._types)
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        folded = MOVES | {"Constant", "ConstantOfShape", "DequantizeLinear", "Mul"}
        for node in self.nodes:
            for tensor in node.input:
                self._consumers.setdefault(tensor, []).append(node)
            self._types.update((node.output[0], a.t.data_type) for a in node.attribute if node.op_type == "Constant")
            if node.op_type in folded and all(tensor in self._constants for tensor in node.input if tensor):
                self._constants.update(node.output)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OnnxGraph:
        """Read a file without its weights. Raises EngineError when it is missing, no ONNX file, or unsound."""
        file = read_onnx(path, small=_KEEP_BYTES, error=EngineError)
        return cls(file.model, file.path)

    def check_weights(self) -> None:
        """Raises EngineError for a file whose weights are not those that its dims and types ask for, or not there."""
        if self.path is not None and (problems := payload_problems(self.model, self.path)):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise EngineError(f"'{self.path}' is incomplete: {problems[0]}{more}")

    def static_shapes(self, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Infer the static shape of every tensor when each graph input has the shape in `minima`.

        Args:
            minima: input name -> shape. Inputs that are left out keep the shape they declare.

        Returns:
            tensor name -> shape, for the tensors whose shape is fully known.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        del copy.graph.value_info[:]
        for value in copy.graph.input:
            if value.name in minima:
                for dim, size in zip(value.type.tensor_type.shape.dim, minima[value.name], strict=False):
                    dim.dim_value = size
        for value in copy.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
        shapes = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                shapes[value.name] = tuple(d.dim_value for d in dims)
        return shapes

    def weight_bytes(self) -> int:
        """What the constants take in an engine at least: floats that only a QuantizeLinear reads become codes."""
        total = 0.0
        for init in self.model.graph.initializer:
            readers = {node.op_type for node in self.consumers(init.name)}
            if readers and all(kind.endswith("QuantizeLinear") for kind in readers):
                size = 1.0
            else:
                size = element_bits(init.data_type) / 8
            total += math.prod(init.dims) * size if readers else 0
        return int(total)

    def module(self, name: str) -> str:
        """Module path of the node of that name; the name itself when the file does not have it."""
        return self._modules.get(name, name)

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        return self._producer.get(tensor)

    def consumers(self, tensor: str) -> list[onnx.NodeProto]:
        return self._consumers.get(tensor, [])

    def is_constant(self, tensor: str) -> bool:
        return tensor in self._constants

    def is_quantized(self, tensor: str) -> bool:
        """Whether a tensor is a dequantized one, perhaps moved, retyped or multiplied by a constant since."""
        return self._dequantize(tensor) is not None

    def code_type(self, tensor: str) -> int | None:
        """The `TensorProto` type of the codes that `tensor` is dequantized from; None where it is not, or not known."""
        node = self._dequantize(tensor)
        if node is None:
            return None
        made = self.producer(node.input[0])
        while made is not None and made.op_type in MOVES:
            made = self.producer(made.input[0])
        codes = node if made is None else made
        if codes.op_type == "QuantizeLinear":
            declared = next((a.i for a in codes.attribute if a.name == "output_dtype"), TensorProto.UNDEFINED)
            if declared != TensorProto.UNDEFINED:
                return int(declared)
        named = (*codes.input[2:3], *node.input[2:3], node.input[0])
        return next((self._types[tensor] for tensor in named if tensor in self._types), None)

    def code_dims(self, tensor: str) -> tuple[int, ...]:
        """The size of the initializer that `tensor` is dequantized from; empty where it is none, or moved since."""
        node = self.producer(tensor)
        if node is None or node.op_type != "DequantizeLinear":
            return ()
        return self._dims.get(node.input[0], ())

    def _dequantize(self, tensor: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that `tensor` comes from, through what moves, retypes or scales by a constant."""
        node = self.producer(tensor)
        for _ in range(REACH):
            if node is None or node.op_type == "DequantizeLinear":
                return node
            if node.op_type not in MOVES and node.op_type not in ("Mul", "Div"):
                return None
            tensors = [t for t in node.input if t and t not in self._constants] or list(node.input[:1])
            node = self.producer(tensors[0]) if tensors else None
        return None
