"""The file of a run: the rows, and what they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.chips import Machine
from benchmarks.gpu.rows import Row, bars


class File:
    """The JSON file of a run; written anew after every change, in place of the old one only when complete."""

    def __init__(self, path: Path, machine: Machine, settings: Mapping[str, Any], commit: str | None) -> None:
        self.path, self.machine = path, machine
        self.rows: dict[tuple[str, str], Row] = {}
        self.head = {
            "benchmark": "gpu",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit or _commit(),
            "machine": describe(machine),
            "settings": dict(settings),
        }

    def resume(self) -> None:
        """Take over the rows of an earlier run on the same chip, if its file is there."""
        if not self.path.exists():
            return
        earlier = json.loads(self.path.read_text())
        if earlier["machine"]["chip"] != self.machine.chip:
            raise SystemExit(f"{self.path} is of {earlier['machine']['chip']}, not of {self.machine.chip}")
        for row in earlier["rows"]:
            self.rows[row["case"], row["variant"]] = Row(**row)

    def put(self, *rows: Row) -> None:
        """Add or replace rows and write the file."""
        for row in rows:
            self.rows[row.case, row.variant] = row
        judged = [{"bar": text, "ok": ok} for text, ok in bars(list(self.rows.values()), self.machine.chip)]
        record = self.head | {"bars": judged, "rows": [asdict(row) for row in self.rows.values()]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(machine: Machine) -> dict[str, Any]:
    """Chip, driver and versions, without names of hosts or users."""
    packages = ("triton", "torchao", "numpy")
    return {
        "chip": machine.chip,
        "capability": machine.capability,
        "memory_gb": machine.memory_gb,
        "l2_mb": machine.l2_bytes and round(machine.l2_bytes / 1e6, 1),
        "peak": machine.peak and asdict(machine.peak),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cublas": _version("nvidia-cublas"),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = str(Path(__file__).parent)
    commit = _first_line("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = commit and _first_line("git", "-C", folder, "status", "--porcelain", "--", ":/passes", ":/qcompile")
    return f"{commit}, with changes" if changed else commit


def _first_line(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)
