"""A PyTorch model as a normalized ATen graph, captured with torch.export."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.program import written_tensors
from qcompile.errors import CaptureError
from qcompile.experts import dense_experts


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Capture `model` for inference as a functional ATen program with linear layers and attention kept whole.

    Args:
        model: a module, captured in eval mode and without a key/value cache, then left as it was; or a program that
            `torch.export` made, with its own example inputs and dynamic shapes.
        args, kwargs: example inputs.
        dynamic_shapes: as in `torch.export.export`.

    Raises:
        CaptureError: no example inputs, torch.export failed (the message carries its reason), or the model writes to a
            buffer, parameter or input while it runs.
    """
    if not isinstance(args, (tuple, list)):
        raise CaptureError(f"args is a tuple of arguments, not a {type(args).__name__}: write (x,) for one argument")
    if isinstance(model, ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise CaptureError("an ExportedProgram has its own inputs; args, kwargs, dynamic_shapes go with a module")
        program = model
    else:
        if not args and not kwargs:
            raise CaptureError("a module is captured with example inputs: give args or kwargs")
        with _for_inference(model), dense_experts(model), torch.no_grad():
            program = _export(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    # The empty table only makes the graph functional; the default one would split linear and attention.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning
        )  # torch 2.13, of itself
        functional: ExportedProgram = program.run_decompositions({})
    _check_pure(functional)
    return functional


def _check_pure(program: ExportedProgram) -> None:
    """Passes take buffers for constants, and calibration runs the graph many times: nothing may be written to."""
    if written := written_tensors(program):
        raise CaptureError(
            f"the model writes to {', '.join(written)} while it runs: use eval mode before torch.export, no"
            " key/value cache, and no operation in place on an input or a buffer"
        )


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> ExportedProgram:
    try:
        program: ExportedProgram = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises whatever the model or a guard raises
        raise CaptureError(f"torch.export could not capture {type(model).__name__}: {_reason(error)}") from error
    return program


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if len(text) < 2000 else text[:2000] + " ..."


@contextlib.contextmanager
def _for_inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and, for Hugging Face models, no key/value cache; everything is put back on the way out."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        model.eval()
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, mode in training.items():
            module.training = mode
