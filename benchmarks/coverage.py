"""Claim: every attention and linear layer of common models runs in the precision of its recipe, or the reason is known.

For each model, recipe and form (static or dynamic shapes): quantize, export for TensorRT and as portable ONNX, compare
both with the program layer by layer, build engines ahead of time, and read the builder's layer list. FP4 runs on SM120
only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch

import qcompile
from benchmarks import record
from benchmarks.fast import of_max
from benchmarks.zoo import ZOO, Model
from qcompile import EngineReport
from qcompile.recipe import QuantizerName, resolve

app = cyclopts.App(help=__doc__)

TARGETS = ("sm89", "sm120")
_SUFFIXES = {
    "attention": ("q_bmm_quantizer", "softmax_bmm_quantizer"),
    "gemm": ("weight_quantizer", "input_quantizer"),
    "conv": ("weight_quantizer", "input_quantizer"),
}
MAX_DIFFERENCE = 0.05  # relative, of the worst layer of a file on the program's own inputs


@dataclass
class Row:
    """One model with one recipe in one form.

    Attributes:
        attention_fp8, attention_total, gemms, kernels: of the engines, the worst and the first of them; gemms by type.
        worst_layer: target of the export -> the largest relative difference of a layer from the program.
        not_compared: why a file could not be compared.
        reasons: what runs in half precision -> why it has to; unexplained: what need not.
        declined: what passes left as it was, each once.
        failures: what went wrong, in words.
    """

    model: str
    recipe: str
    dynamic: bool
    attention_fp8: int = 0
    attention_total: int = 0
    gemms: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    worst_layer: dict[str, float] = field(default_factory=dict)
    not_compared: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    unexplained: dict[str, str] = field(default_factory=dict)
    declined: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, bool]:
        return self.model, self.recipe, self.dynamic

    def cells(self) -> dict[str, Any]:
        gemms = self.gemms
        notes = [*self.failures, *self.unexplained.values(), *dict.fromkeys(self.reasons.values())]
        return {
            "model": self.model,
            "recipe": self.recipe,
            "shapes": "dynamic" if self.dynamic else "static",
            "attention FP8": f"{self.attention_fp8}/{self.attention_total}",
            "GEMMs fp8/fp4/half": f"{gemms.get('fp8', 0)}/{gemms.get('fp4', 0)}/{gemms.get('half', 0)}",
            "kernels sm89": self.kernels.get("sm89"),
            "kernels sm120": self.kernels.get("sm120"),
            "worst layer": max(self.worst_layer.values(), default=None),
            "ok": not self.failures and not self.unexplained,
            "notes": "; ".join(notes),
        }


def targets_of(recipe: str) -> tuple[str, ...]:
    """The targets that `recipe` says it is for, of those that the table has."""
    chosen = qcompile.load_recipe(recipe).metadata.targets
    return tuple(target for target in TARGETS if target in chosen)


def measure(model: Model, recipe: str, *, dynamic: bool, targets: Sequence[str] | None = None) -> Row:
    """Compile one model; what goes wrong is in the row, as the others have to run too."""
    row, start = Row(model.name, recipe, dynamic), time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _compile(model, row, Path(folder), targets_of(recipe) if targets is None else targets)
    except Exception as error:  # whatever it is, it is a result of this row
        row.failures.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _compile(model: Model, row: Row, folder: Path, targets: Sequence[str]) -> None:
    example = model.example(dynamic=row.dynamic)
    program = example.quantized(recipe=of_max(row.recipe), dtype=model.dtype)
    batch = None
    if model.dtype is torch.bfloat16:
        row.not_compared = "ONNX Runtime has no bfloat16 kernels on the CPU"
    else:
        batch = example.args or example.kwargs
    for target in ("tensorrt", "portable"):
        report = qcompile.export_onnx(program, folder / f"{target}.onnx", target=target, compare=batch)
        if target == "tensorrt":
            row.declined = sorted({f"{d.pass_name}: {d.reason}" for d in report.declined})
        if report.comparison is not None:
            row.worst_layer[target] = worst = report.comparison.worst(1)[0].badness
            if worst > MAX_DIFFERENCE:
                row.failures.append(f"{target}: a layer is {worst:.1%} away from the program")
    for target in targets:
        built = qcompile.build_engine(
            folder / "tensorrt.onnx", target=target, profiles=example.profiles, progress=False
        )
        row.kernels[target] = built.kernels
        _judge(model, row, built)


def _judge(model: Model, row: Row, built: EngineReport) -> None:
    """Add an engine to the row: the fewest attentions of all targets, and every gap with its reason."""
    first = not row.gemms
    row.attention_fp8 = built.attention.fp8 if first else min(row.attention_fp8, built.attention.fp8)
    row.attention_total = built.attention.total
    row.gemms = dict(built.gemms) if first else row.gemms
    if built.attention.total != model.attentions:
        row.failures.append(f"{built.target}: {built.attention.total} attentions, not {model.attentions}")
    for gap in built.not_low_precision:
        what = f"{gap.kind} {gap.module}"
        why = model.reason(gap.kind, gap.module) or _left_out(row.recipe, gap.kind, gap.module)
        if why is not None:
            row.reasons[what] = why
        else:
            row.unexplained[what] = f"{built.target} {what}: {gap.reason}"


def _left_out(recipe: str, kind: str, module: str) -> str | None:
    """The reason that lies in the recipe: it has no quantizer for a place of this name, or turns it off."""
    names = [f"{module}.{suffix}".removeprefix(".") for suffix in _SUFFIXES[kind]]
    missing = set(names) - set(resolve(qcompile.load_recipe(recipe), [QuantizerName(n, None) for n in names]).configs)
    if len(missing) == len(names):
        return f"left out by the recipe: {kind} {module}"
    return f"activations left out by the recipe: {kind} {module}" if missing else None


def merge(rows: Sequence[Row], path: Path) -> list[dict[str, Any]]:
    """`rows` as plain data, with those of the file at `path` that were not run again, in the order of the zoo."""
    fresh = {row.key: asdict(row) for row in rows}
    old = json.loads(path.read_text())["results"] if path.exists() else []
    merged = {(r["model"], r["recipe"], r["dynamic"]): r for r in old} | fresh
    order = [model.name for model in ZOO]
    known = {key: row for key, row in merged.items() if key[0] in order}
    return [known[key] for key in sorted(known, key=lambda key: (key[1], order.index(key[0]), key[2]))]


def run(models: Sequence[Model], recipes: Sequence[str], forms: Sequence[bool]) -> Iterator[Row]:
    for recipe in recipes:
        for model in models:
            for dynamic in model.forms:
                if dynamic in forms:
                    yield measure(model, recipe, dynamic=dynamic)


@app.default
def main(
    *,
    only: list[str] | None = None,
    recipe: list[str] | None = None,
    shapes: list[str] | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Compile every model with every recipe. Exit code 1 if anything fails or is in half precision unexplained.

    Parameters
    ----------
    only: names of models, or globs such as "gemma*"; all of them without it.
    recipe: names of shipped recipes; fp8 without it.
    shapes: static, dynamic or both.
    output: JSON file, in place of benchmarks/results/coverage.json; rows that are not run again are kept.
    """
    chosen = [model for model in ZOO if only is None or any(fnmatchcase(model.name, glob) for glob in only)]
    if not chosen:
        print(f"no such model; known: {', '.join(model.name for model in ZOO)}", file=sys.stderr)
        return 2
    forms = [form == "dynamic" for form in shapes or ("static", "dynamic")]
    path = output or record.RESULTS / "coverage.json"
    rows: list[Row] = []
    for row in run(chosen, recipe or ["fp8"], forms):
        rows.append(row)
        state = "; ".join([*row.failures, *row.unexplained.values()]) or "ok"
        print(
            f"{row.model} {row.recipe} {'dynamic' if row.dynamic else 'static'}: {state}", file=sys.stderr, flush=True
        )
        record.write("coverage", merge(rows, path), path)  # after each row: a run of all recipes takes long
    record.show("Coverage", [row.cells() for row in rows])
    return int(any(row.failures or row.unexplained for row in rows))


if __name__ == "__main__":
    sys.exit(app())
