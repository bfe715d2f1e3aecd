"""Claim: what a recipe names is convolved in its format, the rest is listed with a reason, and files equal programs.

For each model of `convolution_zoo` and each recipe: quantize, export for TensorRT and as portable ONNX, compare both
with the program in ONNX Runtime (float32, scales that are powers of two, so that codes are equal but where a sum of FP8
products, which no float32 holds exactly, is added in another order), and build an engine for SM89 of the float16
program, whose layer list is the judge. Beside it stands the unquantized model in half precision, exported by
`torch.onnx.export(dynamo=True)`, from the same builder.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch

import qcompile
from benchmarks import record
from benchmarks.convolution_zoo import MODELS
from benchmarks.fast import of_max
from benchmarks.fusion import export_unquantized
from benchmarks.kernels import differences
from benchmarks.models import Example
from qcompile import Report

app = cyclopts.App(help=__doc__)

RECIPES, TARGET = ("fp8", "int8"), "sm89"
ALL = ("convolutions=all",)
_OTHER_TARGETS = "but for this one on sm"  # quantized, as some target has a kernel: a build for another one says so
MOST_UNEQUAL = 1e-5  # of the codes


@dataclass
class Row:
    """One model with one recipe.

    Attributes:
        coverage: kind -> (how many are quantized, how many there are). left: what is not -> the reason.
        kernels, half_kernels: of the engine, and of that of the unquantized model in half precision. half_error: why
            there is no second one.
        convolutions, attention: of the engine, by type; fused in low precision, and all.
        claimed: what the report counts as quantized and the engine runs otherwise.
        codes, unequal: that quantizers of both files give, and how many differ from the program's.
        furthest: relative distance from the program of the worst tensor of a file, given the program's own inputs.
        failures: what went wrong, in words.
    """

    model: str
    recipe: str
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    kernels: int | None = None
    half_kernels: int | None = None
    half_error: str = ""
    convolutions: dict[str, int] = field(default_factory=dict)
    attention: tuple[int, int] = (0, 0)
    claimed: list[str] = field(default_factory=list)
    codes: int = 0
    unequal: int = 0
    furthest: float = 0.0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not (self.failures or self.claimed) and self.unequal <= MOST_UNEQUAL * self.codes

    def cells(self) -> dict[str, Any]:
        reasons: dict[str, int] = {}
        for why in self.left.values():
            reasons[why] = reasons.get(why, 0) + 1
        return {
            "model": self.model,
            "recipe": self.recipe,
            **{kind: "{} of {}".format(*self.coverage.get(kind, (0, 0))) for kind in ("convolution", "linear")},
            "attention": "{} of {}".format(*self.attention),
            "kernels": self.kernels,
            "half": self.half_kernels,
            "unequal codes": f"{self.unequal} of {self.codes}",
            "ok": self.ok,
            "notes": "; ".join([*self.failures, *self.claimed, *(f"{n} {why}" for why, n in reasons.items())]),
        }


def measure(name: str, recipe: str, *, builds: bool = True) -> Row:
    """Compile one model; what goes wrong is in the row, as the others have to run too."""
    row, start = Row(name, recipe), time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = MODELS[name]()
        for step in (_equal, _build) if builds else (_equal,):
            try:
                step(example, row, Path(folder))
            except Exception as error:  # whatever it is, it is a result of this row
                row.failures.append(_said(error))
    row.seconds = round(time.process_time() - start, 1)
    return row


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:400]


def _equal(example: Example, row: Row, folder: Path) -> None:
    exact = of_max(row.recipe, "calibration.power_of_two=true", *ALL)
    program = example.quantized(recipe=exact, dtype=torch.float32)
    for target in ("tensorrt", "portable"):
        batch = example.args or example.kwargs
        report = qcompile.export_onnx(program, folder / "model.onnx", target=target, compare=batch)
        if target == "tensorrt":
            row.coverage, row.left = report.coverage, left(report)
        assert report.comparison is not None
        for difference in report.comparison.differences:
            row.furthest = max(row.furthest, difference.badness)
            if difference.unequal is not None:
                row.codes += difference.elements
                row.unequal += round(difference.unequal * difference.elements)


def left(report: Report) -> dict[str, str]:
    """Path of what has a weight, or attends, and stayed in floating point -> why."""
    return {
        path: f"{kind}: {report.reasons.get(path, 'left out by the recipe')}"
        for path, kind in report.unquantized.items()
    }


def _build(example: Example, row: Row, folder: Path) -> None:
    path, half = folder / "half.onnx", folder / "rival.onnx"
    report = qcompile.export_onnx(example.quantized(recipe=of_max(row.recipe, *ALL)), path, io_dtype=torch.float16)
    built = qcompile.build_engine(path, target=TARGET, progress=False)
    row.kernels, row.convolutions = built.kernels, {k: n for k, n in built.convolutions.items() if n}
    row.attention = built.attention.low_precision, built.attention.total
    row.claimed = [claim for claim in differences(report, built) if _OTHER_TARGETS not in claim]
    try:
        export_unquantized(example, torch.float16, half)
        row.half_kernels = qcompile.build_engine(half, target=TARGET, progress=False).kernels
    except Exception as error:  # torch's exporter or the builder refuses the plain model: there is no rival
        row.half_error = _said(error)


@app.default
def main(
    *,
    only: list[str] | None = None,
    recipes: list[str] | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Compile every model with every recipe. Exit code 1 if anything fails, or more codes differ.

    Parameters
    ----------
    only: names of models, or globs such as "resnet*"; all of them without it.
    recipes: fp8 and int8 without it.
    output: JSON file, in place of benchmarks/results/convolution_models.json; rows that are not run again are kept.
    """
    path = output or record.RESULTS / "convolution_models.json"
    found = {(r["model"], r["recipe"]): r for r in json.loads(path.read_text())["results"]} if path.exists() else {}
    rows = []
    for name in MODELS:
        for recipe in recipes or RECIPES:
            if only is None or any(fnmatchcase(name, glob) for glob in only):
                rows.append(measure(name, recipe))
                print(*(f"{value}" for value in rows[-1].cells().values()), file=sys.stderr, flush=True)
                found[name, recipe] = asdict(rows[-1])
                record.write(
                    "convolution_models", [found[n, r] for n in MODELS for r in RECIPES if (n, r) in found], path
                )
    record.show("Convolutions", [row.cells() for row in rows])
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(app())
