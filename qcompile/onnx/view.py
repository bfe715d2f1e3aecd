"""A read-only view of an ONNX model that all checks share: flat graph, producers, types, constants, each made once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, shape_inference

from qcompile.onnx.evaluate import Array, Computation, can_compute
from qcompile.onnx.inlining import inline_functions
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.loading import skeleton
from qcompile.onnxfile.nodes import subgraphs
from qcompile.onnxfile.payload import SMALL_BYTES, array
from qcompile.onnxfile.read import check_sound, read_onnx

__all__ = ["STANDARD_DOMAINS", "Array", "ModelView", "all_graphs", "attribute", "infer", "reads", "subgraphs", "walk"]

STANDARD_DOMAINS = ("", "ai.onnx")
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor that `node` reads, those that its subgraphs capture included."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (value.name for value in graph.output)


def walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of `graph` and of its subgraphs, in order; ONNX gives names one scope, so that they never clash."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from walk(inner)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the graphs in it."""
    yield graph
    for node in walk(graph):
        yield from subgraphs(node)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """The value of attribute `name` of `node`, None where it is absent, or that of a function's call."""
    for entry in node.attribute:
        if entry.name == name and not entry.ref_attr_name:
            return helper.get_attribute_value(entry)
    return None


def infer(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Tensor types by strict inference from the inputs alone: what the file says of its intermediates is dropped.

    Raises: one of `LIBRARY_ERRORS`.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for graph in all_graphs(bare.graph):
        del graph.value_info[:]
    inferred = shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    values = (v for g in all_graphs(inferred.graph) for group in (g.input, g.value_info, g.output) for v in group)
    return {value.name: value.type.tensor_type for value in values}


class ModelView:
    """An ONNX model as the checks see it. `flat` has the bodies of model-local functions in place of their calls."""

    def __init__(
        self,
        source: str | os.PathLike[str] | onnx.ModelProto,
        reference_dependence: Mapping[str, set[str]] | None = None,
    ) -> None:
        """Raises VerificationError for what is no ONNX file, or unsound."""
        self.path: Path | None
        if isinstance(source, onnx.ModelProto):
            check_sound(source)
            self.model, self.path = source, None
        else:
            file = read_onnx(source)
            self.model, self.path = file.model, file.path
        self.reference_dependence = reference_dependence

    @cached_property
    def _small_values(self) -> dict[str, Array]:
        return {}

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        inner = (t for node in walk(self.model.graph) for g in subgraphs(node) for t in g.initializer)
        return {tensor.name: tensor for tensor in [*self.model.graph.initializer, *inner]}

    @cached_property
    def skeleton(self) -> onnx.ModelProto:
        return skeleton(self.model, self.path)

    @cached_property
    def flat(self) -> onnx.ModelProto:
        return inline_functions(self.skeleton)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(walk(self.flat.graph))

    @cached_property
    def user_inputs(self) -> list[str]:
        return [value.name for value in self.model.graph.input if value.name not in self.initializers]

    @cached_property
    def producer(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def types(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Inferred types of the flat graph; empty where inference fails, which is the `shapes` check's to report."""
        try:
            return infer(self.flat)
        except LIBRARY_ERRORS:
            return {}

    @cached_property
    def constants(self) -> set[str]:
        """Tensors that no input can change."""
        known = set(self.initializers) - set(self.user_inputs)
        for node in self.nodes:
            if node.op_type not in _RANDOM and all(name in known for name in reads(node)):
                known.update(node.output)
        return known

    def of_type(self, *op_types: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in op_types and node.domain in STANDARD_DOMAINS]

    def elem_type(self, name: str) -> int | None:
        """Element type of tensor `name`, None where it is unknown."""
        if name in self.initializers:
            return self.initializers[name].data_type
        return (self.types[name].elem_type or None) if name in self.types else None

    def dims(self, name: str) -> list[int | str | None] | None:
        """Dims of `name` (a symbol as str, an unknown one as None), None where even the rank is unknown."""
        if name in self.initializers:
            return list(self.initializers[name].dims)
        if name not in self.types or not self.types[name].HasField("shape"):
            return None
        shape = self.types[name].shape.dim
        return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape]

    def size(self, name: str) -> int | None:
        """Number of elements of `name`, None where a dim is not a number."""
        dims = self.dims(name)
        numbers = [dim for dim in dims or [] if isinstance(dim, int)]
        return math.prod(numbers) if dims is not None and len(numbers) == len(dims) else None

    def value(self, name: str) -> Array | None:
        """The value of tensor `name` if it is constant: as it is stored, or computed through the nodes above it.

        Raises: VerificationError for a constant that cannot be computed, or is out of proportion to what is stored.
        """
        if name in self._small_values:
            return self._small_values[name]
        computation = self._computation(name)
        value = computation() if computation is not None else None
        if value is not None and value.nbytes <= SMALL_BYTES:
            self._small_values[name] = value
        return value

    def _computation(self, name: str) -> Computation | None:
        """How constant `name` is computed; None for what is none, or by operators that only a run of the file shows."""
        stored: dict[str, Callable[[], Array]] = {}
        nodes: dict[str, onnx.NodeProto] = {}  # by the first tensor that asked for it, callees first
        waiting, entered_once = [(name, False)], set[str]()
        while waiting:
            tensor, entered = waiting.pop()
            if tensor in stored or tensor in nodes:
                continue
            if tensor in self._small_values or tensor in self.initializers:
                stored[tensor] = partial(self._stored, tensor)
                continue
            node = self.producer.get(tensor) if tensor in self.constants else None
            if node is None or node.domain not in STANDARD_DOMAINS or not can_compute(node.op_type):
                return None
            if not entered and tensor in entered_once:  # of two branches that share names
                return None
            if entered:
                nodes.update(dict.fromkeys(filter(None, node.output), node))
            else:
                entered_once.add(tensor)
                waiting.append((tensor, True))
                waiting += [(used, False) for used in node.input if used]
        opset = next((o.version for o in self.flat.opset_import if o.domain in STANDARD_DOMAINS), 0)
        distinct = {id(node): node for node in nodes.values()}
        return Computation(name, stored, list(distinct.values()), opset)

    def _stored(self, name: str) -> Array:
        return self._small_values[name] if name in self._small_values else array(self.initializers[name], self.path)
