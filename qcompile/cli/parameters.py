"""What the options of several commands have in common: their groups in the help, and what each of them can be."""

from __future__ import annotations

from collections.abc import Mapping

from cyclopts import Group, Parameter

from qcompile.cli.options import UsageError

SEVERAL = Parameter(consume_multiple=True, negative="", show_default=False)
SWITCH = Parameter(negative="", show_default=False)
MODEL = Parameter(group=Group("Model", sort_key=2))
QUANTIZATION = Parameter(group=Group("Quantization", sort_key=3))
_LARGEST = 2**31 - 1


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Raise UsageError for a size that is none."""
    for name, size in sizes.items():
        if size is not None and not 1 <= size <= _LARGEST:
            raise UsageError(f"{name} {size}: a size is 1 or more" + (f", and at most {_LARGEST}" if size > 0 else ""))
