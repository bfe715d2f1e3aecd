"""The verdict of a check of a file; `qcompile.onnx.verify` has the checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check's verdict; `detail` names every node at fault and its module path, or what was looked at."""

    name: str
    passed: bool
    detail: str
