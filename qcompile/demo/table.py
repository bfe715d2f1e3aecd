"""The demo's one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from qcompile.cli.tables import add, size, table

if TYPE_CHECKING:
    from qcompile.demo.route import Row


def results_table(rows: Sequence[Row], images: int) -> Table:
    """Accuracy and size of each form of the model; kernels and attentions fused in FP8 of each engine."""
    targets = list(dict.fromkeys(target for row in rows for target in row.engines))
    engines = [f"{target}\n{what}" for target in targets for what in ("kernels", "FP8 attn.")]
    columns = ["top-1", "logit\nerror", "KL", "file", *engines]
    found = table(f"Digits: {images} held-out images", "", *columns, numbers=columns)
    for row in rows:
        measured = row.accuracy
        cells = [f"{measured.top1:.2%}", f"{measured.error:.4f}", f"{measured.kl:.2e}"]
        cells.append(size(row.file.stat().st_size) if row.file else "")
        for target in targets:
            engine = row.engines.get(target)
            fused = f"{engine.attention.fp8} of {engine.attention.total}" if engine else ""
            cells += [str(engine.kernels) if engine else "", fused]
        add(found, row.name, *cells)
    return found
