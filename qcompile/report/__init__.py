"""What was done, and what was left and why: one base for all reports, the record of a program, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public

if TYPE_CHECKING:
    from qcompile.report.base import ModelReport, ReportBase
    from qcompile.report.coverage import quantized_modules
    from qcompile.report.export import Report

__all__ = ["ModelReport", "Report", "ReportBase", "quantized_modules"]

_PLACES = {
    "ModelReport": "qcompile.report.base",
    "Report": "qcompile.report.export",
    "ReportBase": "qcompile.report.base",
    "quantized_modules": "qcompile.report.coverage",
}

__getattr__, __dir__ = public(__name__, _PLACES)
