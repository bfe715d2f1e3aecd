"""`qcompile inspect`: an ONNX file, or the JSON report of an export or a build, as tables."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qcompile.cli.console import out, warn
from qcompile.cli.options import UsageError
from qcompile.cli.repair import show_repair
from qcompile.messages import first_line
from qcompile.tables import add, show_checkpoint, show_checks, show_engine, show_export, show_rows, size, table


def inspect(file: Path, /) -> int:
    """Show what is quantized in a file, what is not and why, and check it.

    Exit code 1 if a check of the ONNX file fails, or failed when the report was written.

    ```
    qcompile inspect vit.onnx
    qcompile inspect vit.json
    ```

    Parameters
    ----------
    file:
        An ONNX file, by whichever tool; or a JSON report of `export --report`, `build --report` or `repair --report`.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    if file.suffix == ".json":
        return _report(out(), _read(file), file)
    return _onnx(out(), file)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{file} is not a report of qcompile")
    return data


def _report(console: Console, data: dict[str, Any], file: Path) -> int:
    """A report by `export` (which may hold that of an engine), `build`, `repair`, or by the Python API."""
    export = data.get("export", data if data.get("kind") == "export" else None)
    engine = data.get("engine", data if "layers" in data else None)
    checkpoint = data.get("checkpoint", data if data.get("kind") == "checkpoint" else None)
    repair = data.get("repair", data if data.get("kind") == "repair" else None)
    if not export and not engine and not checkpoint and not repair:
        raise UsageError(f"{file} is not a report of qcompile")
    try:
        if data.get("source"):
            console.print(Text(str(data["source"]), style="bold"))
        if checkpoint:
            show_checkpoint(console, checkpoint)
        if repair:
            show_repair(console, repair)
        if export:
            show_export(console, export)
        if engine:
            show_engine(console, engine)
        if failed := data.get("failed"):
            warn(f"not everything was written: {failed}")
            return 1
        return 0 if all(check["passed"] for report in (export, repair) if report for check in report["checks"]) else 1
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a whole report of this version: {first_line(error)}") from error


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
    found += [("rotation" if g.is_rotation else g.kind, g.module, g.unquantized) for g in find_gemms(graph, attentions)]
    coverage = table("Coverage", "", "in the file", "quantized", numbers=("in the file", "quantized"))
    for kind, total in Counter(kind for kind, _, _ in found).items():
        add(coverage, kind, total, sum(k == kind and not missing for k, _, missing in found))
    console.print(coverage)
    gaps = [
        (kind, module, f"{', '.join(missing)} not quantized")
        for kind, module, missing in found
        if missing and kind != "rotation"  # which never is
    ]
    show_rows(console, "Not quantized", ("kind", "module", "why"), gaps)
    show_checks(console, [asdict(check) for check in checks])
    return 0 if all(check.passed for check in checks) else 1
