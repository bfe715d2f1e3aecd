"""The report of a command that writes several things."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qcompile.checkpoint.write.report import CheckpointReport
from qcompile.engine.report import EngineReport
from qcompile.onnx.repair.report import RepairReport
from qcompile.report.base import ReportBase
from qcompile.report.export import Report
from qcompile.report.steps import StepsReport


class CommandReport(ReportBase):
    """What `qcompile export` or `repair` did, as `--report` writes it.

    Attributes:
        source: what was given.
        export, engine, checkpoint, repair: what was made of it. steps: how a decoder's file generates.
        new: files that were written.
        failed: why not everything was; empty if it was.
    """

    kind: Literal["command"] = "command"
    source: str
    export: Report | None = None
    steps: StepsReport | None = None
    engine: EngineReport | None = None
    checkpoint: CheckpointReport | None = None
    repair: RepairReport | None = None
    new: list[str] = Field(default_factory=list)
    failed: str = ""

    @property
    def passed(self) -> bool:
        """Nothing failed, in no part."""
        return not self.failed and all(part.passed for part in self.parts.values())

    @property
    def parts(self) -> dict[str, ReportBase]:
        """Kind -> report, of those that there are."""
        found = (self.export, self.steps, self.engine, self.checkpoint, self.repair)
        return {part.kind: part for part in found if part is not None}
