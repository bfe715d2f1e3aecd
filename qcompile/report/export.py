"""The report of an export: what was quantized, what was left and why, and which checks the file passed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from passes.base import Decline
from qcompile.coverage import quantized_modules
from qcompile.headroom import Headroom
from qcompile.onnx.compare import Comparison
from qcompile.onnx.verify import Check

__all__ = ["Report", "quantized_modules"]


@dataclass
class Report:
    """What an export did.

    Attributes:
        target, opset, recipe: what was asked for.
        ops: ONNX operator type -> count, most frequent first.
        quantized: module path -> format, for linear layers, experts, attentions and norms with a quantized output.
        unquantized: module path -> what it is (`linear`, `experts`, `attention` or `recurrent`, an LSTM, GRU or RNN) if
            it stayed in floating point.
        coverage: `linear`, `experts`, `attention` -> (how many are quantized, how many there are). A fused weight of
            all experts counts once.
        declined: places that a pass looked at and left, with the reason.
        fired: pass -> number of rewrites.
        notices: rules of the recipe that had no effect on this model, or that say why they are there; gaps in the
            calibration data, and numbers that the compute dtype holds badly.
        checks: the verifier's verdicts.
        comparison: layer by layer against the program, if a batch was given.
        bytes: size on disk, external data included.
        headroom: the largest magnitude that calibration saw of each tensor, and how much larger the largest number of
            the compute dtype is, the nearest first; empty without calibration data, or for a program that was loaded.
    """

    target: str
    opset: int
    recipe: str
    ops: dict[str, int]
    quantized: dict[str, str]
    unquantized: dict[str, str]
    coverage: dict[str, tuple[int, int]]
    declined: list[Decline]
    fired: dict[str, int]
    notices: list[str]
    checks: list[Check]
    bytes: int
    comparison: Comparison | None = None
    headroom: list[Headroom] = field(default_factory=list)
    kind: str = field(default="export", init=False)

    def to_json(self) -> str:
        """The report as JSON text; `qcompile inspect` reads it back."""
        data: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "comparison"
        }
        data["declined"] = [dataclasses.asdict(decline) for decline in self.declined]
        data["checks"] = [dataclasses.asdict(check) for check in self.checks]
        data["headroom"] = [dataclasses.asdict(headroom) for headroom in self.headroom]
        data["comparison"] = self.comparison.to_json() if self.comparison is not None else None
        return json.dumps(data, indent=2)
