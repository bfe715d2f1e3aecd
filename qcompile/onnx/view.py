"""A read-only view of an ONNX model that all checks share: flat graph, producers, types, constants, each made once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from qcompile.onnx.inlining import inline_functions
from qcompile.onnx.loading import is_external, read_model, skeleton

Array = npt.NDArray[Any]
STANDARD_DOMAINS = ("", "ai.onnx")
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in `node`'s attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


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
    """The value of attribute `name` of `node`, None where it is absent."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return None


def infer(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Tensor types by strict inference from the inputs alone: what the file says of its intermediates is dropped.

    Raises: onnx.shape_inference.InferenceError.
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
        in_memory = isinstance(source, onnx.ModelProto)
        self.model = source if isinstance(source, onnx.ModelProto) else read_model(source)
        self.base_dir = None if in_memory else Path(os.fspath(source)).resolve().parent
        self.file_name = "" if in_memory else os.path.basename(os.fspath(source))
        self.reference_dependence = reference_dependence

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        inner = (t for node in walk(self.model.graph) for g in subgraphs(node) for t in g.initializer)
        return {tensor.name: tensor for tensor in [*self.model.graph.initializer, *inner]}

    @cached_property
    def skeleton(self) -> onnx.ModelProto:
        return skeleton(self.model, self.base_dir)

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
        except shape_inference.InferenceError:
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
        """The value of tensor `name` if it is constant: as it is stored, or computed through the nodes above it."""
        if name not in self.constants:
            return None
        if name in self.initializers:
            tensor = self.initializers[name]
            return numpy_helper.to_array(tensor, str(self.base_dir or "") if is_external(tensor) else "")
        node = self.producer[name]
        if node.op_type == "Constant" and (stored := attribute(node, "value")) is not None:
            return numpy_helper.to_array(stored)
        feeds = {used: self.value(used) for used in node.input if used}
        opset = next(o.version for o in self.flat.opset_import if o.domain in STANDARD_DOMAINS)
        function = helper.make_function("", "c", list(feeds), [name], [node], [helper.make_opsetid("", opset)])
        (result,) = ReferenceEvaluator(function).run(None, feeds, attributes={})
        return np.asarray(result)
