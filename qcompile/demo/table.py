"""The demo's one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from qcompile.demo.measure import Accuracy
from qcompile.engine.report import EngineReport
from qcompile.report.tables import add, size, table

TARGETS = ("sm89", "sm120")


@dataclass
class Row:
    """One form of the model; `file` and `engines` (target -> report) where there are any.

    targets: what engines of the file can be built for.
    """

    name: str
    accuracy: Accuracy
    file: Path | None = None
    targets: Sequence[str] = TARGETS
    engines: dict[str, EngineReport] = field(default_factory=dict)


def results_table(rows: Sequence[Row], images: int) -> Table:
    """Accuracy and size of each form of the model; kernels and attentions fused in FP8 of each engine."""
    targets = list(dict.fromkeys(target for row in rows for target in row.engines))
    engines = [f"{target}\n{what}" for target in targets for what in ("kernels", "FP8 attn.", "GEMMs")]
    columns = ["top-1", "logit\nerror", "KL", "file", *engines]
    found = table(f"Digits: {images} held-out images", "", *columns, numbers=columns)
    for row in rows:
        measured = row.accuracy
        cells = [f"{measured.top1:.2%}", f"{measured.error:.4f}", f"{measured.kl:.2e}"]
        cells.append(size(row.file.stat().st_size) if row.file else "")
        for target in targets:
            engine = row.engines.get(target)
            fused = f"{engine.attention.fp8} of {engine.attention.total}" if engine else ""
            gemms = "\n".join(f"{count} {kind}" for kind, count in engine.gemms.items() if count) if engine else ""
            cells += [str(engine.kernels) if engine else "", fused, gemms]
        add(found, row.name, *cells)
    return found
