"""Claim: a quantized engine has no more kernels than the half one, and the report claims nothing that it does not do.

Each architecture of the sweep that has an attention goes through a recipe, the export for TensorRT and the builder of
TensorRT-RTX. The rival is the unquantized model in half precision, exported by `torch.onnx.export(dynamo=True)`, in the
same builder. What the export report counts as quantized and the builder's layer list shows in half or float is listed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import cyclopts
import torch

import qcompile
from benchmarks import record
from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.fusion import export_unquantized
from benchmarks.sheet import Sheet, matching
from qcompile import EngineReport, Report

app = cyclopts.App(help=__doc__)

SPARE = 2  # kernels more than the unquantized model may have, for each block


@dataclass
class Row:
    """One architecture.

    Attributes:
        kernels, half_kernels: of the two engines. half_error: why there is no second one.
        blocks: of the model, by `blocks_of`.
        attention: those that are fused in low precision, and all.
        differences: what the export report counts as quantized and the engine runs in half or float.
        error: what went wrong, its first line.
    """

    name: str
    kernels: int | None = None
    half_kernels: int | None = None
    half_error: str = ""
    blocks: int = 0
    attention: tuple[int, int] = (0, 0)
    differences: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        return self.kernels / self.half_kernels if self.kernels and self.half_kernels else None

    @property
    def misses(self) -> list[str]:
        """The bars that it does not reach."""
        found = [f"claimed: {difference}" for difference in self.differences]
        if self.kernels and self.half_kernels and self.kernels - self.half_kernels > SPARE * max(self.blocks, 1):
            found.append(f"{self.kernels} kernels for {self.half_kernels}, with {self.blocks} blocks")
        return found + ([self.error] if self.error else [])

    def told(self) -> str:
        return f"{self.name}: {self.kernels}/{self.half_kernels} {'; '.join(self.misses)[:300]}"


def measure(architecture: Architecture, recipe: str, target: str) -> Row:
    """Build one model twice; what goes wrong is in the row."""
    row, start = Row(architecture.name), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _builds(architecture, row, recipe, target, Path(folder))
    except Exception as error:  # whatever it is, it is the result
        row.error = _said(error)
    row.seconds = round(time.process_time() - start, 1)
    return row


def _builds(architecture: Architecture, row: Row, recipe: str, target: str, folder: Path) -> None:
    example = architecture.example()
    program, path = example.quantized(recipe=recipe), folder / "quantized.onnx"
    report = qcompile.export_onnx(program, path, io_dtype=torch.float16)  # as the rival's
    built = qcompile.build_engine(path, target=target, progress=False)
    row.kernels, row.blocks = built.kernels, blocks_of(example.model)
    row.attention = built.attention.low_precision, built.attention.total
    row.differences = differences(report, built)
    try:
        export_unquantized(example, torch.float16, folder / "half.onnx")
        row.half_kernels = qcompile.build_engine(folder / "half.onnx", target=target, progress=False).kernels
    except Exception as error:  # torch's exporter or the builder refuses the plain model: there is no rival
        row.half_error = _said(error)


def blocks_of(model: torch.nn.Module) -> int:
    """The innermost modules of a list or a sequence that hold two layers with weights or more; experts are of one."""
    lists = [m for m in model.modules() if isinstance(m, (torch.nn.ModuleList, torch.nn.Sequential))]
    found = {child for m in lists for child in m.children() if _layers(child) > 1}
    experts = {m for path, m in model.named_modules() if "expert" in path}
    blocks = found - experts
    return sum(not blocks.intersection(islice(block.modules(), 1, None)) for block in blocks)


def _layers(module: torch.nn.Module) -> int:
    """Modules with a matrix, or a kernel, as their weight."""
    weights = (getattr(m, "weight", None) for m in module.modules())
    return sum(isinstance(weight, torch.Tensor) and weight.ndim > 1 for weight in weights)


def differences(report: Report, built: EngineReport) -> list[str]:
    """What `report` counts as quantized and `built` runs otherwise: a reason belongs to what is not counted."""
    formats = {part: fmt for path, fmt in report.quantized.items() for part in path.replace("+", " ").split()}
    gaps = [gap for gap in built.not_low_precision if gap.module in formats]
    return [f"{gap.kind} {gap.module} ({formats[gap.module]}): {gap.reason}" for gap in gaps]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:400]


def _crashed(name: str, said: str) -> Row:
    return Row(name, error=said)


def summary(rows: Sequence[Row]) -> str:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    middle = f"median {statistics.median(ratios):.3f} x" if ratios else "no ratio"
    over = [row.name for row in rows if any("kernels for" in miss for miss in row.misses)]
    claims = sum(len(row.differences) for row in rows)
    return (
        f"{len(rows)} models, {len(ratios)} with a half engine: {middle}; more than {SPARE} a block in {len(over)};"
        f" {claims} claims untrue"
    )


@app.default
def main(
    *,
    only: list[str] | None = None,
    recipe: str = "fp8",
    target: str = "sm89",
    jobs: int = 2,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Build every architecture of the sweep that has an attention, quantized and in half. Exit code 1 if one misses.

    Parameters
    ----------
    only: names, or globs such as "timm/*"; all without it.
    recipe: name of a shipped recipe.
    target: what engines are built for.
    jobs: how many at a time.
    output: JSON file, in place of benchmarks/results/kernels.json; rows that are not run again are kept.
    """
    swept = json.loads((record.RESULTS / "sweep.json").read_text())["results"]
    attentive = {row["name"] for row in swept if row["outcome"] == "done" and "attention" in row["coverage"]}
    known = [a for a in ARCHITECTURES if a.name in attentive]
    sheet = Sheet("kernels", Row, known, output)
    sheet.fill(matching(known, only), measure, _crashed, Row.told, jobs=jobs, recipe=recipe, target=target)
    print(summary(sheet.rows))
    return int(any(row.misses for row in sheet.rows))


if __name__ == "__main__":
    sys.exit(app())
