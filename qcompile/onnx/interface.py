"""The inputs and outputs of an ONNX file: their names, and which of them go with which of the program's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import GraphModule, Node

from passes.dependence import input_dependence
from passes.traits import is_complex
from qcompile.capture import signature
from qcompile.capture.signature import interface_problem, tensor_inputs
from qcompile.errors import ExportError
from qcompile.messages import some

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def check_interface(program: ExportedProgram) -> None:
    """Raises ExportError for what a program does with its inputs and outputs that an ONNX graph cannot."""
    if problem := interface_problem(program, "an ONNX graph"):
        raise ExportError(problem)


def name_interface(
    model: onnx_ir.Model,
    program: ExportedProgram,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Give inputs and outputs of `model` their names; another value that has one of them gets another.

    Args:
        input_names, output_names: as many as there are; None for those that they have in `program`.

    Each output is a value of its own: an input or a weight that is returned, or a value returned twice, goes through
    an Identity, as one value has one name.
    """
    graph = model.graph
    inputs = _chosen("input_names", input_names, signature.input_names(program))
    outputs = _chosen("output_names", output_names, signature.output_names(program))
    if twice := sorted(name for name, count in Counter(inputs + outputs).items() if count > 1):
        raise ExportError(
            f"input_names and output_names have {some(twice)} twice: an ONNX graph has one value of a name"
        )
    for index, output in enumerate(graph.outputs):
        if output.producer() is None or output in graph.outputs[:index]:
            copy = onnx_ir.node("Identity", [output])
            copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
    wanted = dict(zip([*graph.outputs, *graph.inputs], outputs + inputs, strict=True))
    taken = set(wanted.values())
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in taken and wanted.get(value) != value.name:
            value.name = f"{value.name}_value"
    for value, name in wanted.items():
        value.name = name


def _chosen(argument: str, names: Sequence[str] | None, own: list[str]) -> list[str]:
    """`names`, or the program's `own` where there are none."""
    if names is None:
        return own
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ExportError(f"{argument} is a list of names, not {names!r}")
    if len(names) != len(own):
        raise ExportError(f"{argument} has {len(names)} names, and the program has {len(own)}: {', '.join(own)}")
    return list(names)


def name_dimensions(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    """Call dynamic dimensions what the user called them: `batch` for `s77`, `2*batch` for `2*s77`.

    A name that another symbol has already is not given.
    """
    values = [value for graph in (model.graph, *model.graph.subgraphs()) for value in _values(graph)]
    dims = {str(d.value) for value in values for d in value.shape or () if isinstance(d, onnx_ir.SymbolicDim)}
    taken = {symbol for dim in dims for symbol in _SYMBOL.findall(dim)}
    free = {symbol: name for symbol, name in names.items() if name not in taken}
    if not free:
        return
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(dim, free) for dim in value.shape])


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _renamed(dim: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | onnx_ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return onnx_ir.SymbolicDim(_SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), dim.value))


def complex_notices(program: ExportedProgram) -> list[str]:
    """What files make of complex inputs and outputs, if there are any."""
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = placeholders[len(placeholders) - len(program.graph_signature.user_inputs) :]
    outputs = [n for n in program.graph.output_node().args[0] if isinstance(n, Node)]
    names = [name for position, name in tensor_inputs(program) if is_complex(inputs[position])]
    names += [name for node, name in zip(outputs, signature.output_names(program), strict=True) if is_complex(node)]
    if not names:
        return []
    return [f"ONNX has no complex numbers: the file has {some(names)} as torch.view_as_real gives it, [..., 2]"]


def required_dependence(gm: GraphModule, program: ExportedProgram) -> list[set[int]]:
    """For each tensor that `gm`, unlifted from `program`, returns: the user inputs whose values it depends on."""
    order = {node.name: position for position, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    specs = program.graph_signature.output_specs
    found = zip(input_dependence(gm), specs, strict=True)
    return [{order[name] for name in names} for names, spec in found if isinstance(spec.arg, TensorArgument)]


def by_name(needed: list[set[int]], program: ExportedProgram, model: onnx_ir.Model) -> dict[str, set[str]]:
    """`required_dependence` of `program` by the names of `model`, which it was lowered to: output -> inputs."""
    inputs = zip(tensor_inputs(program), model.graph.inputs, strict=True)
    names = {position: str(value.name) for (position, _), value in inputs}
    return {
        str(output.name): {names[position] for position in positions if position in names}
        for output, positions in zip(model.graph.outputs, needed, strict=True)
    }
