"""All reports that there are, and `read_report`, which knows one by its kind."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

from qcompile.errors import ReportError
from qcompile.messages import first_line, value
from qcompile.report.base import ReportBase

# kind -> module and class, which is imported when a report of that kind is read
KINDS = {
    "checkpoint": ("qcompile.checkpoint.write.report", "CheckpointReport"),
    "command": ("qcompile.cli.report", "CommandReport"),
    "compile": ("qcompile.dynamo.explain", "Explanation"),
    "doctor": ("qcompile.doctor", "Findings"),
    "engine": ("qcompile.engine.report", "EngineReport"),
    "export": ("qcompile.report.export", "Report"),
    "graph": ("qcompile.dynamo.explain", "CompileReport"),
    "program": ("qcompile.report.program", "ProgramReport"),
    "repair": ("qcompile.onnx.repair.report", "RepairReport"),
    "steps": ("qcompile.report.steps", "StepsReport"),
}


def read_report(path: str | os.PathLike[str]) -> ReportBase:
    """The report that a JSON file holds: what `to_json` of any report wrote, or `--report` of the command line.

    One without a version, of a release before reports had one, is read as version 1 if it has a kind.

    Raises:
        ReportError: the file cannot be read, is no report, or is of a kind or version that is not known here.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise ReportError(f"{path} is not a report of qcompile: it holds {value(data)}, and a report is an object")
    kind = data.get("kind")
    if kind is None:
        raise ReportError(
            f"{path} is not a report of qcompile: it has no kind, which those of engines and of the command line have"
            " since reports have a version; write it again"
        )
    if not isinstance(kind, str):
        raise ReportError(f"{path} is not a report of qcompile: its kind is {value(kind)}")
    if kind not in KINDS:
        raise ReportError(f"{path} is a report of the kind {kind!r:.50}, which this qcompile does not know")
    try:
        return report_class(kind).from_data(data)
    except ReportError as error:
        raise ReportError(f"{path} is not a whole report of this version: {error}") from error


def report_class(kind: str) -> type[ReportBase]:
    """The class of the reports of a kind that `KINDS` has."""
    module, name = KINDS[kind]
    found: type[ReportBase] = getattr(importlib.import_module(module), name)
    return found
