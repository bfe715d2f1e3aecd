"""The inputs and outputs of an ONNX file: their names, and which of them go with which of the program's."""

from __future__ import annotations

from typing import Any

import onnx_ir
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from passes.graph import input_dependence
from passes.program import unlift, written_tensors
from qcompile.errors import ExportError


def check_interface(program: ExportedProgram) -> None:
    """Raises ExportError for what a program does with its inputs and outputs that an ONNX graph cannot."""
    if written := written_tensors(program):
        raise ExportError(f"the program writes to {', '.join(written)}, and an ONNX graph keeps no state between runs")
    for spec in program.graph_signature.output_specs:
        constant = isinstance(spec.arg, ConstantArgument) and spec.arg.value is None
        if not constant and not isinstance(spec.arg, TensorArgument):
            value = getattr(spec.arg, "value", spec.arg.name)
            raise ExportError(f"the program returns {value!r}, but an ONNX graph can return tensors only")
    if not any(isinstance(spec.arg, TensorArgument) for spec in program.graph_signature.output_specs):
        raise ExportError("the program returns no tensor")


def output_names(program: ExportedProgram) -> list[str]:
    """Names of the outputs as the model returns them: keys of a dictionary or ModelOutput, else `output`, `output_1`.

    What is None is no output of an ONNX graph. An output called like an input gets `_output` behind its name.
    """
    spec = program.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    inputs = {name for _, name in onnx_inputs(program)}
    user_outputs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    names: list[str] = []
    for (keys, _), output in zip(pytree.tree_flatten_with_path(_keyed(leaves))[0], user_outputs, strict=True):
        if isinstance(output.arg, ConstantArgument):
            continue
        name = "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)
        name = name if name and not name[0].isdigit() else "_".join(filter(None, ("output", name)))
        while name in inputs or name in names:  # {"a": {"b": x}, "a_b": y} makes one name twice
            name += "_output"
        names.append(name)
    return names


def _keyed(tree: Any) -> Any:
    """`tree` with classes that torch knows how to take apart, but not what to call the parts of, as dicts or lists.

    The outputs of diffusers are such classes: dictionaries, registered without keys.
    """

    def is_keyless(part: Any) -> bool:
        known = pytree.SUPPORTED_NODES.get(type(part))
        return known is not None and known.flatten_with_keys_fn is None

    def plain(part: Any) -> Any:
        if not is_keyless(part):
            return part
        children, context = pytree.SUPPORTED_NODES[type(part)].flatten_fn(part)
        children = [_keyed(child) for child in children]
        named = isinstance(context, list) and [type(key) for key in context] == [str] * len(children)
        return dict(zip(context, children, strict=True)) if named else children

    return pytree.tree_map(plain, tree, is_leaf=is_keyless)


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
    wanted |= {value: name for value, (_, name) in zip(graph.inputs, onnx_inputs(program), strict=True)}
    taken = set(wanted.values())
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in taken and wanted.get(value) != value.name:
            value.name = f"{value.name}_value"
    for value, name in wanted.items():
        value.name = name


def onnx_inputs(program: ExportedProgram) -> list[tuple[int, str]]:
    """(position among the flat user inputs, name of the placeholder) of what becomes an input of an ONNX graph.

    An argument that was None or a number when the model was captured is part of the program instead.
    """
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return [(i, spec.arg.name) for i, spec in enumerate(specs) if not isinstance(spec.arg, ConstantArgument)]


def required_dependence(program: ExportedProgram, model: onnx_ir.Model) -> dict[str, set[str]]:
    """ONNX output -> ONNX inputs whose values it has to depend on, read off `program`, which was lowered to `model`."""
    gm = unlift(program)
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    positions = [position for position, _ in onnx_inputs(program)]
    to_onnx = {placeholders[i]: str(value.name) for i, value in zip(positions, model.graph.inputs, strict=True)}
    specs = program.graph_signature.output_specs
    returned = [d for d, spec in zip(input_dependence(gm), specs, strict=True) if isinstance(spec.arg, TensorArgument)]
    return {
        str(output.name): {to_onnx[name] for name in inputs if name in to_onnx}
        for output, inputs in zip(model.graph.outputs, returned, strict=True)
    }
