"""A PyTorch model as a normalized ATen graph, captured with torch.export."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from passes.aliases import merge_aliases
from passes.carried import carry_writes
from passes.functional import functional
from passes.program import drop_idle_writes, separated
from passes.subgraphs import operator_name, subgraph_calls
from qcompile.capture.dimensions import note_dimensions
from qcompile.capture.experts import dense_experts
from qcompile.capture.inference import for_inference
from qcompile.capture.inputs import own_copies, shapes_by_input
from qcompile.capture.reasons import reason, without_graphs
from qcompile.capture.suspects import check_inference, check_inputs
from qcompile.capture.torch_layers import plain_layers
from qcompile.capture.unwrap import unwrapped
from qcompile.errors import CaptureError
from qcompile.messages import some
from qcompile.process import alone


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Capture `model` for inference as a functional ATen program with linear layers and attention kept whole.

    Args:
        model: a module, captured in eval mode, without wrappers of torch around it or in
            it, then left as it was; or a program that `torch.export` made, with its own example inputs and dynamic
            shapes.
        args, kwargs: example inputs. They are copied: a tensor that stands in two places is two inputs.
        dynamic_shapes: as in `torch.export.export`.

    Raises:
        CaptureError: no example inputs, no values for the weights, torch.export failed (the message carries its
            reason), a program exported in training mode, or a model that writes to a parameter while it runs.

    What is written to a buffer or an input is an output, and the buffer an input: see `passes.carried`.
    """
    if not isinstance(args, (tuple, list)):
        raise CaptureError(f"args is a tuple of arguments, not a {type(args).__name__}: write (x,) for one argument")
    with alone():
        if isinstance(model, ExportedProgram):
            if args or kwargs or dynamic_shapes is not None:
                raise CaptureError("an ExportedProgram has its own inputs; args, kwargs, dynamic_shapes are a module's")
            check_inputs(model)
            captured = _functional(separated(model), model)
        else:
            captured = _captured(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    check_inference(captured, exported=isinstance(model, ExportedProgram))
    drop_idle_writes(captured)
    _check_pure(captured)
    _keep_symbols(captured)
    return carry_writes(captured)


def _keep_symbols(program: ExportedProgram) -> None:
    """Leave out ranges of sums of sizes: those of the sizes say them, and torch fails on them after save and load."""
    ranges = program.range_constraints
    for size in [size for size in ranges if not size.is_Symbol]:
        del ranges[size]


def _captured(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    with unwrapped(model) as inner:
        if not args and not kwargs:
            raise CaptureError("a module is captured with example inputs: give args or kwargs")
        shapes = shapes_by_input(dynamic_shapes, inner, args, kwargs)
        copies = own_copies(args, kwargs)
        with for_inference(inner), plain_layers(), dense_experts(inner), torch.no_grad():
            program = _export(inner, *copies, shapes)
            captured = _functional(program, inner)
        note_dimensions(captured, inner, *copies, shapes)
    return captured


def _check_pure(program: ExportedProgram) -> None:
    """Calibration runs the graph many times: no weight may be written to, and nothing else may have an effect."""
    if any(spec.kind is InputKind.TOKEN for spec in program.graph_signature.input_specs):
        ordered = (str(call.args[1]) for call in subgraph_calls(program.graph) if operator_name(call) == "with_effects")
        raise CaptureError(
            f"the model has effects beside its outputs while it runs, by {', '.join(dict.fromkeys(ordered))}: leave"
            " that out of what is captured"
        )
    outputs = program.graph_signature.output_specs
    parameters = [str(spec.target) for spec in outputs if spec.kind is OutputKind.PARAMETER_MUTATION]
    if parameters:
        raise CaptureError(
            f"the model writes to {some(parameters)} while it runs, which are parameters: state that it carries from"
            " call to call is buffers"
        )


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> ExportedProgram:
    try:
        with without_graphs():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises whatever the model or a guard raises
        found = reason(error, model, (args, kwargs))
        raise CaptureError(f"torch.export could not capture {type(model).__name__}: {found}") from error


def _functional(program: ExportedProgram, model: torch.nn.Module | ExportedProgram) -> ExportedProgram:
    """`program` without operations in place, linear and attention kept whole."""
    try:
        with warnings.catch_warnings(), without_graphs():
            warnings.filterwarnings(
                "ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning
            )  # torch 2.13, of itself
            return functional(merge_aliases(program))
    except Exception as error:  # caches, guards on strides, and what torch asserts of itself
        name = "the program" if isinstance(model, ExportedProgram) else type(model).__name__
        found = reason(error, model, program.example_inputs)
        held = sorted({operator_name(call) for call in subgraph_calls(program.graph)})
        told = f" (it holds {', '.join(held)})" if held else ""
        raise CaptureError(f"torch.export captured {name}{told} and could not make it functional: {found}") from error
