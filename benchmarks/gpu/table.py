"""Tables on the terminal, with rich where it is installed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any


def show(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a table; columns in which no row has anything are left out."""
    rows = [{name: _cell(value) for name, value in row.items()} for row in rows]
    names = [name for name in (rows[0] if rows else {}) if any(row[name] != "-" for row in rows)]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
        print(
            title,
            *("  ".join(row[n].ljust(widths[n]) for n in names) for row in ({n: n for n in names}, *rows)),
            sep="\n",
        )
        return
    table = Table(title=title)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(row[name] for name in names), style="bold red" if row["status"].startswith(("wrong", "failed")) else ""
        )
    Console(width=None if os.isatty(1) else 220).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
