"""Reads a TensorRT network that was built layer by layer as the graph that an engine is judged against.

The judge knows ONNX operators. A network has the same ones under other names, so its layers are written down as ONNX
nodes, without any weights, and each layer gets the label that TensorRT's own parser gives to what it makes of a node:
the builder's list of kernels then names layers where it would name nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx
from onnx import TensorProto, helper

from qcompile.engine.graph import OnnxGraph
from qcompile.onnxfile.scopes import NAME_SCOPES

_OPERATORS = {
    "ASSERTION": "Assertion",
    "CAST": "Cast",
    "CONCATENATION": "Concat",
    "CONVOLUTION": "Conv",
    "DEQUANTIZE": "DequantizeLinear",
    "DYNAMIC_QUANTIZE": "TRT_FP4DynamicQuantize",
    "EINSUM": "Einsum",
    "GATHER": "Gather",
    "IDENTITY": "Identity",
    "MATRIX_MULTIPLY": "MatMul",
    "QUANTIZE": "QuantizeLinear",
    "SELECT": "Where",
    "SHUFFLE": "Reshape",
    "SLICE": "Slice",
    "SOFTMAX": "Softmax",
    "SQUEEZE": "Squeeze",
    "UNSQUEEZE": "Unsqueeze",
}
_ARITHMETIC = {"SUM": "Add", "SUB": "Sub", "PROD": "Mul", "DIV": "Div", "MIN": "Min", "MAX": "Max"}
_ACTIVATIONS = {"TANH": "Tanh", "CLIP": "Clip", "RELU": "Relu"}
_TYPES = {
    "FLOAT": TensorProto.FLOAT,
    "HALF": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "INT8": TensorProto.INT8,
    "FP8": TensorProto.FLOAT8E4M3FN,
    "FP4": TensorProto.FLOAT4E2M1,
}
_NORMALIZATION_SCALE = 4  # the input of an attention that scales its softmax to codes


class FilledNetwork(Protocol):
    """What is known of a network besides its layers.

    Attributes:
        modules: the module path of each layer, in their order.
        dimensions: input name -> its dimensions: a size, or the name of a dynamic one.
    """

    @property
    def modules(self) -> Sequence[str]: ...

    @property
    def dimensions(self) -> Mapping[str, Sequence[int | str]]: ...

    def static_shapes(self, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """As `OnnxGraph.static_shapes`, by the names of the network's tensors."""


class NetworkSource(Protocol):
    """Something that adds layers to an `INetworkDefinition` of the Python package `package`."""

    @property
    def package(self) -> str: ...

    def fill(self, network: Any) -> FilledNetwork:
        """Add all layers, each under a name of its own. What it returns owns the memory of the weights."""


class NetworkGraph(OnnxGraph):
    """The graph of a filled network."""

    def __init__(self, trt: Any, network: Any, filled: FilledNetwork) -> None:
        super().__init__(_as_onnx(trt, network, filled))
        self._filled = filled  # the network reads the weights in it until it is built

    def static_shapes(self, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        return self._filled.static_shapes(minima)


def _as_onnx(trt: Any, network: Any, filled: FilledNetwork) -> onnx.ModelProto:
    """The layers of `network` as nodes; each layer is labelled with the node that it belongs to."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    attention_inputs: dict[str, Any] = {}
    for index, module in enumerate(filled.modules):
        layer = network.get_layer(index)
        kind = layer.type.name
        layer.metadata = _label(layer.name)
        if kind == "CONSTANT":
            output = layer.get_output(0)
            data_type = _TYPES.get(output.dtype.name, TensorProto.UNDEFINED)
            constants.append(onnx.TensorProto(name=output.name, data_type=data_type, dims=tuple(output.shape)))
        elif kind == "ATTENTION_INPUT":  # an attention is two layers, with nothing between them to look at
            attention_inputs[layer.get_output(0).name] = layer
        elif kind == "ATTENTION_OUTPUT":
            first = attention_inputs[layer.get_input(0).name]
            first.metadata = layer.metadata
            nodes.append(_attention(first, layer))
        else:
            nodes.append(_node(trt, layer))
            constants += _kernel(trt, layer, nodes[-1])
        if nodes and nodes[-1].name == layer.name:
            entry = onnx.StringStringEntryProto(key=NAME_SCOPES, value=repr(["", module, layer.name]))
            nodes[-1].metadata_props.append(entry)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.UNDEFINED, list(dims))
        for name, dims in filled.dimensions.items()
    ]
    outputs = [onnx.ValueInfoProto(name=network.get_output(i).name) for i in range(network.num_outputs)]
    return helper.make_model(helper.make_graph(nodes, "network", inputs, outputs, constants))


def _label(name: str) -> str:
    return f"[ONNX Layer: {name}]"


def _node(trt: Any, layer: Any) -> onnx.NodeProto:
    node = helper.make_node(_operator(trt, layer), _inputs(layer), _outputs(layer), name=layer.name)
    if layer.type.name == "DEQUANTIZE" and (size := _block_size(layer)):
        node.attribute.append(helper.make_attribute("block_size", size))
    if layer.type.name == "QUANTIZE":
        made = _TYPES.get(layer.get_output(0).dtype.name, TensorProto.UNDEFINED)
        node.attribute.append(helper.make_attribute("output_dtype", made))
    return node


def _kernel(trt: Any, layer: Any, node: onnx.NodeProto) -> list[onnx.TensorProto]:
    """The weight of a convolution in floating point, which the layer has where the node has an input."""
    if layer.type.name != "CONVOLUTION" or layer.num_inputs > 1:
        return []
    layer.__class__ = trt.IConvolutionLayer
    out, kernel = layer.num_output_maps, tuple(layer.kernel_size_nd)
    data_type = _TYPES.get(layer.get_output(0).dtype.name, TensorProto.UNDEFINED)
    node.input.append(f"{layer.name}_kernel")
    dims = (out, layer.kernel.size // (out * math.prod(kernel)), *kernel)
    return [onnx.TensorProto(name=node.input[1], data_type=data_type, dims=dims)]


def _operator(trt: Any, layer: Any) -> str:
    kind = layer.type.name
    if kind == "ELEMENTWISE":
        layer.__class__ = trt.IElementWiseLayer  # the bindings hand out the base class, without the operation
        return _ARITHMETIC.get(layer.op.name, "Elementwise")
    if kind == "ACTIVATION":
        layer.__class__ = trt.IActivationLayer
        return str(_ACTIVATIONS.get(trt.IActivationLayer.type.fget(layer).name, "Activation"))
    return _OPERATORS.get(kind, str(kind).title().replace("_", ""))


def _attention(first: Any, last: Any) -> onnx.NodeProto:
    node = helper.make_node("TRT_Attention", _inputs(first), _outputs(last), name=last.name)
    if first.num_inputs > _NORMALIZATION_SCALE and first.get_input(_NORMALIZATION_SCALE) is not None:
        node.attribute.append(helper.make_attribute("normalization_quantize_to_type", TensorProto.FLOAT8E4M3FN))
    return node


def _inputs(layer: Any) -> list[str]:
    tensors = (layer.get_input(i) for i in range(layer.num_inputs))
    return ["" if tensor is None else tensor.name for tensor in tensors]


def _outputs(layer: Any) -> list[str]:
    return [layer.get_output(i).name for i in range(layer.num_outputs)]


def _block_size(layer: Any) -> int:
    """How many elements of the last axis share a scale; 0 where that is not a number of them."""
    codes, scale = tuple(layer.get_input(0).shape), tuple(layer.get_input(1).shape)
    if len(scale) < 2 or len(scale) != len(codes) or scale[-1] <= 0 or codes[-1] <= 0:
        return 0
    return int(codes[-1] // scale[-1])
