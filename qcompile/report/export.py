"""The report of an export: what was quantized, what was left and why, and which checks the file passed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from qcompile.report.base import ModelReport
from qcompile.report.check import Check
from qcompile.report.comparison import Comparison
from qcompile.report.convolutions import ConvolutionEstimate
from qcompile.report.headroom import Headroom
from qcompile.report.low_rank import LowRankCost
from qcompile.report.ranges import RangeGrowth


class Report(ModelReport):
    """What an export did.

    Attributes:
        target, opset, recipe: what was asked for.
        ops: ONNX operator type -> count, most frequent first.
        quantized: module path -> format, for linear layers, experts, convolutions, attentions and norms with a
            quantized output.
        unquantized: module path -> what it is (`linear`, `experts`, `convolution`, `transposed_convolution`,
            `attention`, `recurrent`, an LSTM, GRU or RNN, `embedding`, `bilinear`) if it stayed in floating point.
        reasons: module path -> why it did, but for what the recipe leaves out.
        coverage: `linear`, `experts`, `convolution`, `attention` -> (how many are quantized, how many there are). A
            fused weight of all experts counts once.
        declined: places that a pass looked at and left, with the reason.
        fired: pass -> number of rewrites.
        notices: rules of the recipe that had no effect on this model, or that say why they are there; gaps in the
            calibration data, and numbers that the compute dtype holds badly.
        checks: the verifier's verdicts.
        comparison: layer by layer against the program, if a batch was given.
        bytes: size on disk, external data included.
        headroom: the largest magnitude that calibration saw of each tensor, and how much larger the largest number of
            the compute dtype is, the nearest first; empty without calibration data.
        ranges: how the ranges of what has a constant scale grew over the samples, which says whether these sufficed;
            None with fewer than two batches.
        convolutions: each, quantized or not, with its operations, bytes, and what codes gain by a roofline.
        low_rank: the low-rank parts beside quantized weights, with their rank and bytes; their products are among
            `unquantized` as `low_rank`, and not in `coverage`.

    What `quantize` noted on the program is in it also for a program that was saved and loaded.
    """

    kind: Literal["export"] = "export"
    target: str
    opset: int
    ops: dict[str, int]
    fired: dict[str, int]
    checks: list[Check]
    bytes: int
    comparison: Comparison | None = None
    headroom: list[Headroom] = Field(default_factory=list)
    ranges: RangeGrowth | None = None
    convolutions: list[ConvolutionEstimate] = Field(default_factory=list)
    low_rank: list[LowRankCost] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @field_serializer("comparison")
    def _listed(self, comparison: Comparison | None) -> list[dict[str, object]] | None:
        return comparison.to_json() if comparison is not None else None

    @field_validator("comparison", mode="before")
    @classmethod
    def _of_list(cls, found: Any) -> Any:
        return {"differences": found} if isinstance(found, list) else found
