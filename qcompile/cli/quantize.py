"""The middle of `qcompile export`: a source, a recipe and calibration data make a quantized program."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

import qcompile
from qcompile.cli.console import interactive, step, warn
from qcompile.cli.options import HOW_TO_CALIBRATE, RANDOM_DATA, UsageError
from qcompile.decoders import Cache
from qcompile.errors import CalibrationError, CaptureError
from qcompile.files import replaced
from qcompile.frontends.quantized import is_finished
from qcompile.remedy import with_remedy
from qcompile.source import MADE_UP, Data, Source


def quantized(
    source: Source,
    recipe: qcompile.Recipe | None,
    calibration: Data | None,
    dtype: torch.dtype | None,
    cache: Cache | None = None,
) -> tuple[ExportedProgram, Any]:
    """The quantized program, and the first batch that it was calibrated with (None without calibration)."""
    batches, first = _calibration(calibration, source)
    return quantized_with(batches, source, recipe, dtype, cache), first


def quantized_with(
    batches: Iterable[Any] | Mapping[str, torch.Tensor] | None,
    source: Source,
    recipe: qcompile.Recipe | None,
    dtype: torch.dtype | None,
    cache: Cache | None = None,
) -> ExportedProgram:
    """The quantized program; errors are in the words of the command line."""
    step(f"quantizing with the recipe {recipe.metadata.name}" if recipe is not None else "capturing the model")
    args, kwargs = _inputs(source)
    try:
        return qcompile.quantize(
            source.model,
            args,
            kwargs,
            recipe=recipe,
            calibration=batches,
            dynamic_shapes=source.dynamic_shapes,
            dtype=dtype,
            progress=interactive(),
            cache=cache,
        )
    except CaptureError as error:
        if "Constraints violated" not in str(error):
            raise
        hint = "On the command line a range is given like this: --dynamic input_ids:1=sequence:1:512"
        raise CaptureError(f"{error}\n{hint}") from error
    except CalibrationError as error:
        if batches is not None:
            raise
        problem = CalibrationError(f"{error}\nOn the command line: {HOW_TO_CALIBRATE}")
        raise with_remedy(problem, RANDOM_DATA) from error


def imported(source: Source, calibration: Data | None, dtype: torch.dtype | None) -> tuple[ExportedProgram, Any]:
    """The program of a model that is quantized already, and the first batch of the calibration data.

    Raises UsageError for a program that is finished, which calibration and `dtype` come too late for.
    """
    if source.program is not None and is_finished(source.program):
        if calibration is not None or dtype is not None:
            raise UsageError(f"{source.name} is quantized already, and finished: leave out --calibration and --dtype")
        return source.program, None
    batches, first = _calibration(calibration, source)
    step("reading what is quantized")
    program = qcompile.import_quantized(
        source.model,
        *_inputs(source),
        calibration=batches,
        dynamic_shapes=source.dynamic_shapes,
        dtype=dtype,
        progress=interactive(),
    )
    return program, first


def _inputs(source: Source) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    """Example inputs; none of a program, which brings its own along."""
    return (source.args, source.kwargs) if source.program is None else ((), None)


def save(program: ExportedProgram, path: Path) -> None:
    """Save a program whole or not at all."""
    with replaced(path) as new, open(new, "wb") as file:
        held = _Held(file)
        torch.export.save(program, held)  # type: ignore[arg-type]
        held.check()


class _Held(io.RawIOBase):
    """A file for torch, which ends the process where writing raises: the first error is kept for later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0  # torch does so once, when all is written

    def check(self) -> None:
        """Raise what writing raised."""
        if self._error is not None:
            raise self._error


def _calibration(data: Data | None, source: Source) -> tuple[Iterable[Any] | None, Any]:
    """The batches of the calibration data, and the first of them; or a state, which has none."""
    if data is None:
        return None, None
    batches, first = _peek(data.batches(source))
    step(f"calibration data: {data}")
    if MADE_UP in data.notices:
        warn(MADE_UP)
    return batches, first


def _peek(batches: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """The batches, and the first of them."""
    if isinstance(batches, Mapping):
        return batches, None
    if isinstance(batches, Sequence):
        return batches, batches[0] if batches else None
    iterator = iter(batches)
    for first in iterator:
        return chain([first], iterator), first
    return [], None
