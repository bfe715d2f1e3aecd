"""The report of a repair."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qcompile.report.base import ReportBase
from qcompile.report.check import Check


class RepairReport(ReportBase):
    """What `qcompile.repair_onnx` did.

    Attributes:
        changed: False if the file was standard already, and an equal one was written.
        opset, ir_version: (of the old file, of the new file).
        standardized: legacy operator -> how many became standard ones.
        folded: initializer of codes -> the float weight that it was made from, its shape, type and granularity.
        biases: float bias -> the codes that it was made from.
        codes: INT8 or INT4 initializer -> the codes that it was made from, of another type or with a zero point.
        floats: float weight of a convolution that TensorRT has no FP8 kernel for -> the codes that it was made from.
        pools: FP8 quantizers in front of a MaxPool that are behind it now.
        signed: activations that are quantized to INT8 now, and were to UINT8.
        offsets: quantizers whose integer zero point was not 0 and is an addition, a subtraction or in a bias now.
        zero_points: FP8 quantizers whose zero point was not 0 and is now written out.
        casts: Casts between a DQ and a GEMM that are gone.
        transposes: weights that are stored transposed, as their GEMM reads them.
        relus: Relus in front of an FP8 QuantizeLinear that are a Max now, which ONNX Runtime does not drop.
        quantizers: QuantizeLinear, DequantizeLinear of the new file -> how many.
        shapes: how many of their outputs have a type and a shape in the new file.
        kept: operators that only TensorRT can read -> how many were left as they were.
        notices: what to know about the new file.
        checks: the verifier's verdicts.
        bytes: size on disk (of the old file, of the new one), external data included.
    """

    kind: Literal["repair"] = "repair"
    changed: bool
    opset: tuple[int, int]
    ir_version: tuple[int, int]
    standardized: dict[str, int]
    folded: dict[str, str]
    biases: dict[str, str]
    codes: dict[str, str]
    floats: dict[str, str] = Field(default_factory=dict)
    pools: int = 0
    signed: int
    offsets: list[str]
    zero_points: list[str]
    casts: int
    transposes: int
    relus: int
    quantizers: dict[str, int]
    shapes: int
    kept: dict[str, int]
    checks: list[Check]
    bytes: tuple[int, int]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)
