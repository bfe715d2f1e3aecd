"""The report of a quantized program: what is known of it before a back end has it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.export import ExportedProgram

from passes.base import run_pipeline
from passes.pipelines import RESTORE
from passes.program import unlift
from qcompile.process import alone
from qcompile.report.base import ModelReport
from qcompile.report.convolutions import ConvolutionEstimate
from qcompile.report.coverage import Modules
from qcompile.report.headroom import Headroom
from qcompile.report.low_rank import LowRankCost
from qcompile.report.ranges import RangeGrowth
from qcompile.report.record import record_of


class ProgramReport(ModelReport):
    """What `quantize` made, of a program in memory or in a `.pt2` file.

    Attributes:
        recipe, quantized, unquantized, reasons, coverage, declined, fired, notices, headroom, ranges, convolutions,
            low_rank: as in `qcompile.Report`; no target has left out anything yet.
        calibration: what the ranges of activations were found on: `512 samples`.
        dimensions: names of dynamic dimensions.
        bytes: of all tensors.
    """

    kind: Literal["program"] = "program"
    fired: dict[str, int]
    calibration: str
    dimensions: list[str]
    bytes: int
    headroom: list[Headroom] = Field(default_factory=list)
    ranges: RangeGrowth | None = None
    convolutions: list[ConvolutionEstimate] = Field(default_factory=list)
    low_rank: list[LowRankCost] = Field(default_factory=list)

    @classmethod
    def of(cls, program: ExportedProgram) -> ProgramReport:
        """Raises PassError for a program that writes to its buffers or inputs."""
        noted = record_of(program)
        tensors = (*program.state_dict.values(), *program.constants.values())
        with alone():
            gm = unlift(program)
            run_pipeline(RESTORE, gm)
            modules = Modules.of(gm, noted.declined)
        return cls(
            recipe=noted.recipe,
            quantized=modules.quantized,
            unquantized=modules.unquantized,
            reasons=modules.reasons,
            coverage=modules.coverage,
            declined=noted.declined,
            fired=dict(noted.fired),
            notices=noted.notices,
            headroom=noted.headroom,
            ranges=noted.ranges,
            convolutions=modules.convolutions,
            low_rank=modules.low_rank,
            calibration=noted.calibration,
            dimensions=sorted(set(noted.dimensions.values())),
            bytes=sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)),
        )
