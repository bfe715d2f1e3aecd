"""`qcompile inspect`: an ONNX file, a program, or a JSON report of any kind, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qcompile.cli.console import out, warn
from qcompile.cli.doctor import show_findings
from qcompile.cli.options import UsageError
from qcompile.cli.repair import show_repair
from qcompile.errors import ReportError
from qcompile.messages import first_line
from qcompile.report.tables import (
    add,
    plain,
    show_checkpoint,
    show_checks,
    show_engine,
    show_explanation,
    show_export,
    show_graph,
    show_program,
    show_rows,
    show_steps,
    size,
    table,
)


def inspect(file: Path, /) -> int:
    """Show what is quantized in a file, what is not and why, and check it.

    Exit code 1 if a check of the ONNX file fails, or something failed when the report was written.

    ```
    qcompile inspect vit.onnx
    qcompile inspect vit.json
    qcompile inspect vit.pt2
    ```

    Parameters
    ----------
    file:
        An ONNX file, by whichever tool; a program, `.pt2`, that was quantized; or a JSON report: of `export`, `build`
        or `repair` with --report, of `doctor --json`, or what a report of the Python API wrote with `to_json`.
    """
    if not file.is_file():
        missing = f"{file} is a directory: give a file" if file.is_dir() else f"there is no file {file}"
        raise UsageError(missing)
    if file.suffix == ".json":
        return _report(out(), file)
    if file.suffix == ".pt2":
        return _program(out(), file)
    return _onnx(out(), file)


def _report(console: Console, file: Path) -> int:
    """Any report, and the parts of one of a command, each by its kind."""
    from qcompile.cli.report import CommandReport
    from qcompile.reports import read_report

    try:
        report = read_report(file)
        parts = report.parts if isinstance(report, CommandReport) else {report.kind: report}
        if isinstance(report, CommandReport):
            console.print(plain(report.source, "bold"))
        for kind, part in parts.items():
            _SHOWN[kind](console, part.data())
    except ReportError as error:
        raise UsageError(str(error)) from error
    except ArithmeticError as error:  # a size that nothing has
        raise UsageError(f"{file} is not a whole report of this version: {first_line(error)}") from error
    if isinstance(report, CommandReport) and report.failed:
        warn(f"not everything was written: {report.failed}")
    return 0 if report.passed else 1


_SHOWN: Mapping[str, Callable[[Console, Mapping[str, Any]], None]] = {
    "checkpoint": show_checkpoint,
    "compile": show_explanation,
    "doctor": show_findings,
    "engine": show_engine,
    "export": show_export,
    "graph": show_graph,
    "program": show_program,
    "repair": show_repair,
    "steps": show_steps,
}


def _program(console: Console, file: Path) -> int:
    from qcompile.report.program import ProgramReport
    from qcompile.source.pt2.load import load_program

    _SHOWN["program"](console, ProgramReport.of(load_program(file)).data())
    return 0


def _onnx(console: Console, file: Path) -> int:
    from qcompile.engine.graph import OnnxGraph
    from qcompile.engine.patterns import find_attentions, find_gemms
    from qcompile.onnx.foreign import verify_foreign

    checks = verify_foreign(file)
    graph = OnnxGraph.load(file)
    operators = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.nodes)
    console.print(Text(f"{file}: {size(file.stat().st_size)}", style="bold"))
    console.print(Text(", ".join(f"{count} {name}" for name, count in operators.most_common())), soft_wrap=True)

    attentions = find_attentions(graph)
    found = [("attention", a.module, a.unquantized) for a in attentions]
    found += [(g.stays or g.kind, g.module, g.unquantized) for g in find_gemms(graph, attentions)]
    coverage = table("Coverage", "", "in the file", "quantized", numbers=("in the file", "quantized"))
    for kind, total in Counter(kind for kind, _, _ in found).items():
        add(coverage, kind, total, sum(k == kind and not missing for k, _, missing in found))
    console.print(coverage)
    gaps = [
        (kind, module, f"{', '.join(missing)} not quantized")
        for kind, module, missing in found
        if missing and kind not in ("rotation", "low-rank part")  # which never are
    ]
    show_rows(console, "Not quantized", ("kind", "module", "why"), gaps)
    show_checks(console, [asdict(check) for check in checks])
    return 0 if all(check.passed for check in checks) else 1
