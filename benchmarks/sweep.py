"""Claim: of what plain torch.export captures, nearly everything is quantized, exported, verified and built.

Each architecture of `benchmarks.architectures` goes, in a process of its own, through recipe `fp8` (or another), both
targets, ONNX Runtime and the TensorRT-RTX builder. No layer may be missing from the report's lists. Where a model is
refused, the sentence is kept: a refusal is a result, too. A model of convolutions of which the recipe wants nothing, as
it leaves classifiers out, counts as neither.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import qcompile
from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.coverage import MAX_DIFFERENCE
from benchmarks.models import Example
from benchmarks.sheet import Sheet, matching
from passes.graph import ancestors, module_path

app = cyclopts.App(help=__doc__)

CLOSE = 0.02  # relative difference of ONNX Runtime's outputs from the program's; float16 sums in another order
NOISE = 1e-5  # no difference at all: a norm of one element is zero but for rounding
STAGES = ("example", "torch.export", "quantize", "tensorrt", "portable", "lists", "onnxruntime", "build", "done")
OUTCOMES = ("not captured", "nothing for the recipe", "refused", "done")  # the first: by plain torch.export


@dataclass
class Row:
    """One architecture.

    Attributes:
        stage: the first of `STAGES` that failed, or `done`.
        outcome: one of `OUTCOMES`.
        error: what was said, its first line; `kind` is the class of the exception.
        coverage: of the file for TensorRT, as in its report. kernels: of the engine.
        difference: of ONNX Runtime from the program, relative, over all floating-point outputs.
    """

    name: str
    stage: str = "example"
    outcome: str = "not captured"
    kind: str = ""
    error: str = ""
    coverage: dict[str, Any] = field(default_factory=dict)
    kernels: int | None = None
    difference: float | None = None
    seconds: float = 0.0

    def told(self) -> str:
        return f"{self.name}: {self.stage} {self.kind} {self.error}".rstrip()


def measure(architecture: Architecture, recipe: str, target: str) -> Row:
    """Take one model through all stages, as far as it goes."""
    row, start = Row(architecture.name), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _stages(architecture, row, recipe, target, Path(folder))
    except Exception as error:  # whatever it is, it is the result
        row.kind = type(error).__name__ if isinstance(error, qcompile.QCompileError) else f"raw {type(error).__name__}"
        row.error = (str(error).strip() or row.kind).partition("\n")[0][:400]
        nothing = isinstance(error, qcompile.errors.RecipeError) and "quantizes nothing of this model" in row.error
        row.outcome = OUTCOMES[1] if nothing else row.outcome
    row.seconds = round(time.process_time() - start, 1)
    return row


def _stages(architecture: Architecture, row: Row, recipe: str, target: str, folder: Path) -> None:
    example = architecture.example()
    row.stage = "torch.export"
    linears = _linears(torch.export.export(example.model, example.args, example.kwargs, strict=False))
    row.stage, row.outcome = "quantize", "refused"
    program = example.quantized(recipe=recipe)
    row.stage = "tensorrt"
    report = qcompile.export_onnx(program, folder / "tensorrt.onnx", target="tensorrt")
    row.coverage = report.coverage
    row.stage = "portable"
    qcompile.export_onnx(program, folder / "portable.onnx", target="portable")
    row.stage = "lists"
    _check_lists(report, linears)
    row.stage = "onnxruntime"
    row.difference = _difference(program, folder / "portable.onnx", example)
    if not row.difference <= CLOSE:  # a router that chose otherwise, or a layer that is wrong?
        batch = example.args or example.kwargs
        compared = qcompile.export_onnx(program, folder / "portable.onnx", target="portable", compare=batch).comparison
        assert compared is not None
        worst = max((d for d in compared.differences if not d.max_abs <= NOISE), key=lambda d: d.badness)
        if not worst.badness <= MAX_DIFFERENCE:
            raise AssertionError(
                f"ONNX Runtime differs from the program by {row.difference:.3g}, {worst.name} by {worst.badness:.3g} on"
                " the program's own inputs"
            )
    row.stage = "build"
    row.kernels = qcompile.build_engine(folder / "tensorrt.onnx", target=target, progress=False).kernels
    row.stage = row.outcome = "done"


def _linears(program: ExportedProgram) -> list[str]:
    """The paths of the linear layers that an output depends on."""
    needed = ancestors([program.graph.output_node()])
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return list(dict.fromkeys(module_path(node) for node in layers if node in needed))


def _check_lists(report: qcompile.Report, linears: Sequence[str]) -> None:
    """Raises AssertionError naming the linear layers that the report does not know.

    A module that multiplies with a parameter, or with pieces of one, is known by these: `hc.fn`, `in_proj.rows_0_64`.
    """
    known = {*report.quantized, *report.unquantized, *(decline.module for decline in report.declined)}
    paths = [path for name in known for path in name.replace("+", " ").split()]
    parts = {path.rsplit(".", levels)[0] for path in paths for levels in range(3)}
    missing = [name for name in linears if not any(part == name or part.endswith(f".{name}") for part in parts)]
    if missing:
        raise AssertionError(f"in no list of the report: {', '.join(missing[:8])}")


def _difference(program: ExportedProgram, path: Path, example: Example) -> float:
    """The largest relative difference of a floating-point output of ONNX Runtime from that of the program."""
    given = [x for x in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(x, torch.Tensor)]
    by_name = {name: x for name, x in example.kwargs.items() if isinstance(x, torch.Tensor)}
    session = qcompile.onnx_session(path)
    names = [argument.name for argument in session.get_inputs()]
    if len(names) == len(given):
        by_name = dict(zip(names, given, strict=True)) | {n: x for n, x in by_name.items() if n in names}
    feeds = {name: by_name[name].numpy() for name in names}
    wanted = pytree.tree_leaves(program.module()(*example.args, **example.kwargs))
    found = [torch.from_numpy(x) for x in session.run(None, feeds)]
    tensors = [x for x in wanted if isinstance(x, torch.Tensor)]
    pairs = [(a.double(), b.double()) for a, b in zip(found, tensors, strict=True) if b.is_floating_point()]
    return max((float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs), default=0.0)


def _crashed(name: str, said: str) -> Row:
    return Row(name, "quantize", "refused", "crash", said)


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    asked = counts["done"] + counts["refused"]
    return f"{len(rows)} architectures: {dict(counts)}; {counts['done'] / max(asked, 1):.1%} of {asked} done"


@app.default
def main(
    *,
    only: list[str] | None = None,
    recipe: str = "fp8",
    target: str = "sm89",
    jobs: int = 2,
    failed: bool = False,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Take every architecture through quantize, both exports, ONNX Runtime and the builder.

    Parameters
    ----------
    only: names, or globs such as "timm/*"; all without it.
    recipe: name of a shipped recipe.
    target: what engines are built for.
    jobs: how many at a time.
    failed: only those that are not done in the file.
    output: JSON file, in place of benchmarks/results/sweep.json; rows that are not run again are kept.
    """
    sheet = Sheet("sweep", Row, ARCHITECTURES, output)
    chosen = matching(ARCHITECTURES, only)
    if failed:
        done = {row.name for row in sheet.rows if row.outcome == "done"}
        chosen = [a for a in chosen if a.name not in done]
    sheet.fill(chosen, measure, _crashed, Row.told, jobs=jobs, recipe=recipe, target=target)
    print(summary(sheet.rows))
    return int(any(row.outcome == "refused" for row in sheet.rows))


if __name__ == "__main__":
    sys.exit(app())
