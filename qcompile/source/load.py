"""`load_source`: from what the command line says (a directory, a file, a function) to a model with example inputs."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qcompile.errors import SourceError
from qcompile.remedy import Remedy, with_remedy
from qcompile.source.declared import Declared, inputs_of, with_inputs
from qcompile.source.examples import Sizes
from qcompile.source.huggingface import load_directory
from qcompile.source.model import Source
from qcompile.source.pt2.load import load_program

FUNCTION = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")
_FORMS = "a Hugging Face directory, a .pt2 file, or package.module:factory"


def load_source(
    text: str,
    *,
    random_weights: int | None = None,
    batch: int = 1,
    sequence: int | None = None,
    submodule: str | None = None,
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    inputs: Sequence[Declared] = (),
) -> Source:
    """Load the model that `text` names.

    Args:
        text: a directory with a Hugging Face config.json; a `.pt2` file that `torch.export.save` wrote, of tensors,
            numbers, text, names and operators: one with other objects (a cache or a class of your own among its
            example inputs, an object of TorchScript, compiled code) is refused before it is opened; or
            `package.module:factory`, a function that returns (model, example inputs[, dynamic_shapes]) with the inputs
            as a tensor, a tuple or a keyword dict, or with `inputs` the model alone. The current directory is
            importable.
        random_weights: seed, for a directory: make the weights up instead of reading them.
        batch, sequence: size of a directory's example inputs; sequence is in tokens.
        shapes: of calibration data: a directory's example inputs are like these in all but the batch.
        inputs: example inputs, all of them, in the place of what the source has.
        submodule: path of the part of a directory's model to take, such as `model.encoder`.

    Raises:
        SourceError: names what was looked for and what to do.
    """
    found = _found(text, random_weights, Sizes(batch, sequence, shapes), submodule, bool(inputs))
    return with_inputs(found, inputs)


def _found(text: str, random_weights: int | None, sizes: Sizes, submodule: str | None, declared: bool) -> Source:
    """`declared`: there will be other example inputs, and need be none."""
    path = Path(text)
    if path.is_dir():
        return load_directory(path, random_weights=random_weights, sizes=sizes, submodule=submodule, declared=declared)
    if random_weights is not None or sizes.tokens is not None or submodule is not None or sizes.batch != 1:
        raise SourceError(
            "random weights, a submodule, and sizes of the example inputs are for Hugging Face directories;"
            f" {text} is none, and brings its own"
        )
    if path.suffix == ".pt2":
        return _load_program(path, declared)
    if FUNCTION.fullmatch(text) and not path.exists():
        return _call_factory(text, declared)
    problem = "is neither of these" if path.exists() else "does not exist"
    raise SourceError(f"{text!r} {problem}: a source is {_FORMS}")


def import_function(text: str) -> Any:
    """The object that `package.module:name` names. Raises SourceError when there is none, or its module fails."""
    match = FUNCTION.fullmatch(text)
    assert match is not None
    if os.getcwd() not in sys.path and "" not in sys.path:  # a console script does not look there by itself
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        if error.name is None or not f"{match['module']}.".startswith(f"{error.name}."):
            raise SourceError(f"{text}: importing {match['module']} failed: {error}") from error
        raise SourceError(f"{text}: there is no module {error.name!r}, here or installed") from error
    except Exception as error:  # whatever the user's module raises
        raise SourceError(f"{text}: importing {match['module']} failed: {type(error).__name__}: {error}") from error
    for part in match["name"].split("."):
        if not hasattr(found, part):
            raise SourceError(f"{text}: {match['module']} has no {match['name']}")
        found = getattr(found, part)
    if not callable(found):
        raise SourceError(f"{text}: it is a {type(found).__name__}, and a function is wanted")
    return found


def call_function(text: str) -> Any:
    """What the function that `text` names returns. Raises SourceError with the reason when it fails."""
    function = import_function(text)
    try:
        return function()
    except Exception as error:  # whatever the user's function raises
        raise SourceError(f"{text} failed: {type(error).__name__}: {error}") from error


def _call_factory(text: str, declared: bool) -> Source:
    result = call_function(text)
    if declared and isinstance(result, torch.nn.Module):
        result = (result, ())
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        raise SourceError(
            f"{text} returned {_describe(result)}; it has to return (model, example inputs) or (model, example inputs,"
            " dynamic_shapes), with an nn.Module and the inputs as a tensor, a tuple or a dict; the inputs of a model"
            " alone are declared with --input NAME=SHAPE:DTYPE"
        )
    model, inputs = result[0], result[1]
    dynamic = result[2] if len(result) == 3 else None
    name = f"{text} ({type(model).__name__})"
    if isinstance(inputs, Mapping):
        return Source(model, (), dict(inputs), dynamic, name)
    if isinstance(inputs, torch.Tensor):
        return Source(model, (inputs,), {}, dynamic, name)
    if isinstance(inputs, list | tuple) and (inputs or declared):
        return Source(model, tuple(inputs), {}, dynamic, name)
    raise SourceError(f"{text}: example inputs are a tensor, a tuple or a dict, not {_describe(inputs)}")


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def _load_program(path: Path, declared: bool) -> Source:
    if not path.is_file():
        raise SourceError(f"there is no file {path}")
    program = load_program(path)
    if program.example_inputs is None and not declared:
        told = tuple(map(str, inputs_of(program)))
        problem = SourceError(
            f"{path}: the program was saved without example inputs; declare them: --input {' '.join(told)}"
        )
        raise with_remedy(problem, Remedy(options={"--input": told}))
    args, kwargs = program.example_inputs or ((), {})
    return Source(program, tuple(args), dict(kwargs), None, path.name)
