"""Layer by layer, the ONNX file against the FX program that it was lowered from."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from passes.formats import get_format
from passes.graph import aten, dtype, is_call
from passes.ir import ATTENTION, QUANTIZE
from passes.operators import NORMS
from passes.program import unlift
from passes.sdpa import SDPA
from qcompile.capture.batches import flatten_batch
from qcompile.capture.signature import tensor_inputs
from qcompile.onnx.compare import Comparison, Segment, compare, run_onnx_layers
from qcompile.onnx.fp4 import as_bytes
from qcompile.onnx.names import NAME_SCOPES, path_of_scopes
from qcompile.onnx.view import Array
from qcompile.process import alone

# A layer ends at one of these: what lies between two of them is compared as a whole.
# Transcendental functions are ends: the erf of two runtimes differs in its last bit, and some codes behind it with it.
_LAYER_ENDS = (
    QUANTIZE,
    ATTENTION,
    SDPA,
    aten.matmul.default,
    aten.linear.default,
    aten.embedding.default,
    *NORMS,
    *(aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.softmax.int),
    *(aten.sin.default, aten.cos.default, aten.exp.default),
)
# What these choose by is an end as well: of numbers that are nearly equal two runtimes choose another one.
_CHOICES = (aten.argmin.default, aten.argmax.default, aten.topk.default, aten.sort.default)
_BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
}


def compare_layers(path: Path, converted: Any, program: ExportedProgram, batch: Any) -> Comparison:
    """Run the program on `batch`, each layer of the file on the program's values, and compare what comes out.

    Args:
        path: the ONNX file.
        converted: the ONNXProgram it was written from; values inside of it carry the names of the FX nodes.
        program: tells how `batch` (in any form that calibration takes) is flattened.

    Every layer gets the inputs that the program computed, so one flipped code does not reach the layers behind it.
    """
    recorded = _record(converted.exported_program, converted.model, flatten_batch(batch, program))
    segments = _segments(converted.model, recorded)
    reference = {name: recorded[name] for segment in segments for name in segment.outputs}
    modules = {str(v.name): _module(node) for node in converted.model.graph for v in node.outputs}
    found = compare(reference, run_onnx_layers(path, segments).values)
    return Comparison(tuple(dataclasses.replace(d, module=modules.get(d.name, "")) for d in found.differences))


def _module(node: onnx_ir.Node) -> str:
    return path_of_scopes(node.metadata_props.get(NAME_SCOPES, "[]")) or ""


class _Recorder(Interpreter):
    """Interprets a graph and keeps the values of some of its nodes as numpy arrays, under the names given."""

    def __init__(self, gm: GraphModule, names: dict[Node, list[str]]) -> None:
        super().__init__(gm)
        self.names = names
        self.values: dict[str, Array] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.names:
            self.values.update(dict.fromkeys(self.names[n], _to_numpy(result)))
        return result


def _record(program: ExportedProgram, model: onnx_ir.Model, inputs: list[Any]) -> dict[str, Array]:
    """ONNX name -> value of the inputs, the layer ends and the outputs of `program`, run on `inputs`."""
    with alone():
        gm = unlift(program, sink=False)
        as_bytes(gm)
    names: dict[Node, list[str]] = defaultdict(list)
    placeholders = gm.graph.find_nodes(op="placeholder")
    for (position, _), value in zip(tensor_inputs(program), model.graph.inputs, strict=True):
        names[placeholders[position]].append(str(value.name))
    for node, original in zip(gm.graph.nodes, program.graph.nodes, strict=True):  # a copy can have another name
        if is_call(node, *_LAYER_ENDS) and not _is_packed(node):
            names[node].append(original.name)
        if is_call(node, *_CHOICES):
            chosen_by, named = node.args[0], original.args[0]
            assert isinstance(chosen_by, Node) and isinstance(named, Node)
            names[chosen_by].append(named.name)
    results = (node for node in gm.graph.output_node().args[0] if node is not None)  # type: ignore[union-attr]
    for node, value in zip(results, model.graph.outputs, strict=True):
        assert isinstance(node, Node)
        names[node].append(str(value.name))
    recorder = _Recorder(gm, names)
    with torch.no_grad():
        recorder.run(*map(_as_taken, inputs, placeholders))
    return recorder.values


def _as_taken(value: Any, placeholder: Node) -> Any:
    """`value` in the dtype of `placeholder`, where the file has another one at its boundary than the program."""
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.to(dtype(placeholder))
    return value


def _is_packed(node: Node) -> bool:
    """Whether `node` makes codes that share a byte: the file has each of them apart."""
    return is_call(node, QUANTIZE) and get_format(str(node.kwargs["format"])).is_fp4


def _to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_complex():  # as files hold it
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in _BITS:
        return np.asarray(tensor.numpy())
    carrier, dtype = _BITS[tensor.dtype]
    return np.asarray(tensor.view(carrier).numpy().view(dtype))


def _segments(model: onnx_ir.Model, recorded: dict[str, Array]) -> list[Segment]:
    """One segment for each recorded value of the ONNX graph, from the recorded values before it."""
    segments = []
    for node in model.graph:
        for output in node.outputs:
            if output.name in recorded:
                inputs = _known_above(output, recorded)
                segments.append(Segment(str(output.name), {n: recorded[n] for n in sorted(inputs)}, [str(output.name)]))
    return segments


def _known_above(value: onnx_ir.Value, known: dict[str, Array]) -> set[str]:
    """The nearest recorded values and graph inputs that `value` is computed from."""
    found: set[str] = set()
    pending, seen = [value], {value}
    while pending:
        producer = pending.pop().producer()
        for operand in _read(producer) if producer is not None else ():
            if operand is None or operand in seen:
                continue
            seen.add(operand)
            if operand.name in known:
                found.add(str(operand.name))
            else:
                pending.append(operand)
    return found


def _read(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    """What `node` and the graphs in it read."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type is onnx_ir.AttributeType.GRAPH]
    inner = [value for graph in graphs for made in graph.all_nodes() for value in made.inputs]
    return [*node.inputs, *inner, *(value for graph in graphs for value in graph.outputs)]
