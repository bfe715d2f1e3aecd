"""What a check returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qcompile.onnx.view import ModelView


class Findings(NamedTuple):
    """Problems, each naming its node and module path, and one line on what was looked at."""

    problems: list[str]
    seen: str


CheckFunction = Callable[[ModelView], Findings]
