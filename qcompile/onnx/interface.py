"""The inputs and outputs of an ONNX file: their names, and which of them go with which of the program's."""

from __future__ import annotations

import onnx_ir
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import Node

from passes.dependence import input_dependence
from passes.legalize.half_kernels import is_complex
from passes.program import unlift
from qcompile.errors import ExportError
from qcompile.messages import some
from qcompile.signature import interface_problem, output_names, tensor_inputs


def check_interface(program: ExportedProgram) -> None:
    """Raises ExportError for what a program does with its inputs and outputs that an ONNX graph cannot."""
    if problem := interface_problem(program, "an ONNX graph"):
        raise ExportError(problem)


def name_interface(model: onnx_ir.Model, program: ExportedProgram) -> None:
    """Give inputs and outputs of `model` their names in `program`; another value that has one of them gets another.

    Each output is a value of its own: an input or a weight that is returned, or a value returned twice, goes through
    an Identity, as one value has one name.
    """
    graph, names = model.graph, output_names(program)
    for index, output in enumerate(graph.outputs):
        if output.producer() is None or output in graph.outputs[:index]:
            copy = onnx_ir.node("Identity", [output])
            copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
    wanted = dict(zip(graph.outputs, names, strict=True))
    wanted |= {value: name for value, (_, name) in zip(graph.inputs, tensor_inputs(program), strict=True)}
    taken = set(wanted.values())
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in taken and wanted.get(value) != value.name:
            value.name = f"{value.name}_value"
    for value, name in wanted.items():
        value.name = name


def complex_notices(program: ExportedProgram) -> list[str]:
    """What files make of complex inputs and outputs, if there are any."""
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = placeholders[len(placeholders) - len(program.graph_signature.user_inputs) :]
    outputs = [n for n in program.graph.output_node().args[0] if isinstance(n, Node)]
    names = [name for position, name in tensor_inputs(program) if is_complex(inputs[position])]
    names += [name for node, name in zip(outputs, output_names(program), strict=True) if is_complex(node)]
    if not names:
        return []
    return [f"ONNX has no complex numbers: the file has {some(names)} as torch.view_as_real gives it, [..., 2]"]


def required_dependence(program: ExportedProgram, model: onnx_ir.Model) -> dict[str, set[str]]:
    """ONNX output -> ONNX inputs whose values it has to depend on, read off `program`, which was lowered to `model`."""
    gm = unlift(program)
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    positions = [position for position, _ in tensor_inputs(program)]
    to_onnx = {placeholders[i]: str(value.name) for i, value in zip(positions, model.graph.inputs, strict=True)}
    specs = program.graph_signature.output_specs
    returned = [d for d, spec in zip(input_dependence(gm), specs, strict=True) if isinstance(spec.arg, TensorArgument)]
    return {
        str(output.name): {to_onnx[name] for name in inputs if name in to_onnx}
        for output, inputs in zip(model.graph.outputs, returned, strict=True)
    }
