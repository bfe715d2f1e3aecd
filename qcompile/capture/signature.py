"""The inputs and outputs of a program: what they are called, and whether a graph of tensors can have them."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from passes.carried import initial_state, state_names
from passes.program import written_tensors

_CACHES = ("past_key_values", "present")
"""Inputs and outputs whose parts runtimes call with dots: `past_key_values.0.key`."""


def interface_problem(program: ExportedProgram, container: str) -> str | None:
    """What a program does with its inputs and outputs that `container` ("an ONNX graph") cannot; None if nothing."""
    if written := written_tensors(program):
        return (
            f"the program writes to {', '.join(written)}, and {container} keeps no state between runs: quantize it, and"
            " that is among its inputs and outputs"
        )
    for spec in program.graph_signature.output_specs:
        constant = isinstance(spec.arg, ConstantArgument) and spec.arg.value is None
        if not constant and not isinstance(spec.arg, TensorArgument):
            value = getattr(spec.arg, "value", spec.arg.name)
            return f"the program returns {value!r}, but {container} can return tensors only"
    if not any(isinstance(spec.arg, TensorArgument) for spec in program.graph_signature.output_specs):
        return "the program returns no tensor"
    return None


def output_names(program: ExportedProgram) -> list[str]:
    """Names of the outputs as the model returns them: keys of a dictionary or ModelOutput, else `output`, `output_1`.

    What is None is no output. An output called like an input gets `_output` behind its name. What a program carries is
    called as the buffer or the input that it is, with `.out` behind.
    """
    spec = program.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    inputs = {name for _, name in tensor_inputs(program)}
    user_outputs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    names: list[str] = []
    carried = bool(state_names(program))
    for (keys, _), output in zip(pytree.tree_flatten_with_path(_keyed(leaves))[0], user_outputs, strict=True):
        if isinstance(output.arg, ConstantArgument):
            continue
        parts = _parts(keys)
        if parts and carried:
            part, *parts = parts
            parts = [f"{parts[0]}.out"] if part == "state" else parts
        name = ("." if parts[:1] and parts[0] in _CACHES else "_").join(parts)
        name = name if name and not name[0].isdigit() else "_".join(filter(None, ("output", name)))
        while name in inputs or name in names:  # {"a": {"b": x}, "a_b": y} makes one name twice
            name += "_output"
        names.append(name)
    return names


def input_names(program: ExportedProgram) -> list[str]:
    """Names of what `tensor_inputs` finds: those of the placeholders, of a cache as runtimes have them, and the path of
    a buffer that is carried."""
    spec = program.call_spec.in_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [_parts(keys)[1:] for keys, _ in pytree.tree_flatten_with_path(leaves)[0]]  # the first: args or kwargs
    state = initial_state(program)

    def called(path: list[str], name: str) -> str:
        if path[0] in state:
            return path[1]
        return ".".join(path) if path[0] in _CACHES and path[1:] else name

    return [called(paths[i], name) for i, name in tensor_inputs(program)]


def _parts(keys: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]


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


def tensor_inputs(program: ExportedProgram) -> list[tuple[int, str]]:
    """(position among the flat user inputs, name of the placeholder) of what is an input at run time.

    An argument that was None or a number when the model was captured is part of the program instead.
    """
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return [(i, spec.arg.name) for i, spec in enumerate(specs) if not isinstance(spec.arg, ConstantArgument)]
