"""`load_program`: a `.pt2` file that `torch.export.save` wrote, looked at before torch opens it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

import passes.ir  # noqa: F401  # a saved program of ours holds these operators
from qcompile.compat.torch import load_pt2
from qcompile.errors import SourceError
from qcompile.messages import first_line
from qcompile.source.pt2.archive import UnsafeArchive, check_archive

# pytree and unpickling know the classes of these when they are imported
_WITH_CLASSES = {"transformers": "transformers.modeling_outputs", "torchao": "torchao.quantization"}


def load_program(path: Path) -> ExportedProgram:
    """Load a program of plain data; a second time with the library imported whose classes it names.

    Raises:
        SourceError: it cannot be read, or holds what opening it could run.
    """
    try:
        check_archive(path)
        program: ExportedProgram = load_pt2(str(path)).exported_programs["model"]
        _check_signature(program)
    except Exception as error:  # zipfile, pickle, json, sympy and torch each have their own
        reason = _innermost(error)
        if any(name in f"{error} {reason}" and _import_once(module) for name, module in _WITH_CLASSES.items()):
            return load_program(path)
        raise SourceError(f"{path} cannot be read as a torch.export program: {_told(error, reason)}") from error
    return program


def _check_signature(program: ExportedProgram) -> None:
    """Refuse a program whose inputs or results are not those of its graph, which torch does not compare."""
    call = program.module_call_graph[0].signature if program.module_call_graph else None
    if call is None:
        raise ValueError("it does not say how it is called")
    specs = program.graph_signature
    inputs = sum(spec.kind == InputKind.USER_INPUT for spec in specs.input_specs)
    outputs = sum(spec.kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT) for spec in specs.output_specs)
    if call.in_spec.num_leaves != inputs or call.out_spec.num_leaves != outputs:
        raise ValueError("its inputs or results are not those of its graph")
    if len(program.graph.find_nodes(op="placeholder")) != len(specs.input_specs):
        raise ValueError("its inputs are not those of its graph")


def _told(error: Exception, reason: str) -> str:
    if not isinstance(error, UnsafeArchive):
        return reason
    return (
        f"it holds {error}. Only plain data is opened (tensors, numbers, text, names and operators), since opening"
        " more can run code of the file; what torch.export.load returns for one that you trust is taken in Python"
    )


def _innermost(error: BaseException) -> str:
    """The first line of the error that led to all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "".join(letter if letter.isprintable() else "?" for letter in first_line(error)[:300])


def _import_once(module: str) -> bool:
    if module in sys.modules or importlib.util.find_spec(module.partition(".")[0]) is None:
        return False
    importlib.import_module(module)
    return True
