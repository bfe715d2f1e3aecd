"""The ONNX part of `qcompile export`: from a source to a file, and an engine of it."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

import qcompile
from qcompile.cli.ahead import check_before_loading, check_before_quantizing
from qcompile.cli.build import build_and_show
from qcompile.cli.console import out, step, write_report
from qcompile.cli.decoders import add_companions, behind_a_past, compare_steps
from qcompile.cli.preview import AnyRange, show_preview
from qcompile.cli.quantize import imported, quantized, quantized_with, save
from qcompile.cli.report import CommandReport
from qcompile.cli.started import is_first
from qcompile.cli.wanted import Wanted
from qcompile.errors import QCompileError
from qcompile.report.tables import show_export
from qcompile.source import Data, Source, load_source, with_dynamic_shapes

__all__ = ["Wanted", "export_onnx"]


def export_onnx(wanted: Wanted) -> int:
    """Write what is wanted, and show the reports."""
    calibration = check_before_loading(wanted)
    source = _load(wanted, calibration)
    finished = check_before_quantizing(wanted, source)
    if wanted.dry_run:
        if finished:
            program, _ = imported(source, None, wanted.dtype)
        else:
            program = quantized_with(AnyRange(), source, wanted.recipe, wanted.dtype, wanted.cache)
        show_preview(wanted, source, program, calibration)
        return 0
    if finished:
        program, first = imported(source, calibration, wanted.dtype)
    else:
        program, first = quantized(source, wanted.recipe, calibration, wanted.dtype, wanted.cache)
    if not is_first():
        return 0
    compared = first if first is not None else source.example_batch
    parts: dict[str, Any] = {}
    new: list[str] = []
    try:
        _write(wanted, source, program, compared, parts, new)
    except QCompileError as error:
        parts["failed"] = str(error)
        if new:
            step(f"{' and '.join(new)} {'is' if len(new) == 1 else 'are'} new, and nothing else")
        raise
    finally:
        if wanted.report is not None:
            write_report(wanted.report, CommandReport(source=source.name, new=new, **parts))
    return 0


def _write(
    wanted: Wanted,
    source: Source,
    program: ExportedProgram,
    compared: Any,
    parts: dict[str, Any],
    new: list[str],
) -> None:
    """Write one file after the other; `parts` of the report and `new` tell how far it came."""
    if wanted.save_program is not None:
        save(program, wanted.save_program)
        new.append(str(wanted.save_program))
    step(f"exporting to {wanted.output}")
    exported = qcompile.export_onnx(
        program,
        wanted.output,
        target=wanted.onnx_target,
        opset=wanted.opset,
        block_fp8=wanted.block_fp8,
        io_dtype=wanted.io_dtype,
        compare=behind_a_past(program, compared)
        if wanted.compare and wanted.cache
        else compared
        if wanted.compare
        else None,
    )
    new.append(str(wanted.output))
    parts["export"] = exported
    show_export(out(), parts["export"].data())
    if wanted.folder is not None:
        new += map(str, add_companions(wanted, source))
    if wanted.cache is not None and wanted.compare:
        parts["steps"] = compare_steps(wanted.output, program, compared, source)
    if wanted.builds:
        step("building the engine")
        parts["engine"] = build_and_show(wanted.output, wanted.engine, wanted.target, wanted.profiles, wanted.expect)
        new += [str(wanted.engine)] if wanted.engine is not None else []


def _load(wanted: Wanted, calibration: Data | None) -> Source:
    step(f"loading {wanted.source}")
    source = load_source(
        wanted.source,
        random_weights=wanted.random_weights,
        batch=wanted.batch,
        sequence=wanted.sequence,
        submodule=wanted.submodule,
        shapes=calibration.shapes() if calibration is not None else {},
        inputs=wanted.inputs,
    )
    return with_dynamic_shapes(source, wanted.dynamic, batch=wanted.dynamic_batch)
